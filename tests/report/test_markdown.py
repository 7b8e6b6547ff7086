import dataclasses

from autopeft.report.markdown import render_markdown
from autopeft.report.verdict import verdict


def test_the_first_line_is_the_verdict(record, options, sites):
    assert render_markdown(record, options, sites).splitlines()[0] == f"**{verdict(record).headline}**"
    beaten = dataclasses.replace(record.contenders[1], gain=-0.01)
    lost = dataclasses.replace(record, contenders=(record.contenders[0], beaten))
    assert render_markdown(lost, options, sites).startswith("**No gain over uniform lora (attn)")


def test_every_section_is_there(record, options, sites):
    text = render_markdown(record, options, sites)
    for piece in (
        "budget: 100 trainable (`0.1%` of 100,000); spent 100, 100.0 % of it",
        "3 adapters, 40 trainable parameters",
        "## Gain over the baselines",
        "### By method",
        "### By block",
        "| blocks.1.mlp.fc1 | bias | bias | 1 | 8 | 20.0 % | 0.5 |",
        "5 trials: 4 done, 1 pruned.",
        "| one full training | 200 | 1.00 |",
        'timm.create_model("local-dir:exports/timm", pretrained=True)',
        "| device | cpu |",
    ):
        assert piece in text


def test_a_single_plan_without_trials_renders(record, options):
    bare = dataclasses.replace(
        record, trials=(), contenders=(), best=-1, costs={}, seconds={}, exports={}, environment={}
    )
    text = render_markdown(bare, options)
    assert "## Search history" not in text
    assert "## Where the budget went" in text


def test_a_plan_that_buys_nothing_says_so(record):
    assert "only the classifier is trained" in render_markdown(record, [])
