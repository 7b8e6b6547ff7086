import dataclasses
import html
import json
import re
import subprocess
import sys

from autopeft.report.html import render_html


def test_the_page_is_whole_and_loads_nothing(record, options, sites):
    page = render_html(record, options, sites, sensitivity={sites[0].name: 1.0}, predicted={3: 0.1})
    assert "91.0 % on the test split" in page
    assert page.count("Plotly.newPlot(box") == 1
    head, _, rest = page.partition("<script>/**")
    shell = head + rest[rest.index("</script>") :]
    assert not re.findall(r"(?:src|href)=", shell)
    assert "default-src 'none'" in head
    for name in ("gain", "allocation", "spending", "sensitivity", "history", "curves", "prediction"):
        assert f'id="figure-{name}"' in page


def test_the_figures_are_valid_json(record, options, sites):
    page = render_html(record, options, sites)
    payload = re.search(r"var figures = (\{.*?\}), root", page)
    assert payload is not None
    assert set(json.loads(payload[1])) == {"gain", "allocation", "spending", "history", "curves"}


def test_names_from_the_data_cannot_become_markup(record, options, sites):
    evil = "</script><img src=x onerror=alert(1)>"
    hurt = dataclasses.replace(
        record,
        model={"name": evil},
        contenders=tuple(dataclasses.replace(c, name=evil) for c in record.contenders),
        trials=tuple(dataclasses.replace(t, name=evil) for t in record.trials),
    )
    page = render_html(hurt, options, sites)
    assert evil not in page
    assert "<img" not in page.replace("<image", "")
    assert html.escape(evil) in page


def test_no_gain_looks_like_none(record):
    beaten = dataclasses.replace(record.contenders[1], gain=-0.01)
    lost = dataclasses.replace(record, contenders=(record.contenders[0], beaten))
    assert 'class="verdict none"' in render_html(lost)
    assert 'class="verdict good"' in render_html(record)
    bare = dataclasses.replace(record, contenders=(), trials=(), best=-1)
    page = render_html(bare)
    assert 'class="verdict open"' in page
    assert len(page) < 100_000  # without figures there is no plotly.js


def test_a_report_needs_no_torch():
    code = (
        "import sys\n"
        "import autopeft.report.html, autopeft.report.markdown, autopeft.report.tables, autopeft.report.dashboard\n"
        "print([m for m in ('torch', 'timm', 'optuna', 'plotly', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
