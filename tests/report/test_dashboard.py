import dataclasses
import io
import json
import logging
import threading
import urllib.request

import bottle
import optuna
import pytest

from autopeft.errors import StoreError, UsageError
from autopeft.report import dashboard
from autopeft.report.dashboard import application, publish, serve
from autopeft.report.rows import allocation_rows
from autopeft.store import storage
from autopeft.store.paths import RunFolder
from autopeft.store.storage import default_url, open_storage


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """Close every database that a test opens: an open one is a warning at the next garbage collection."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storages = []
    monkeypatch.setattr(
        storage, "open_storage", lambda *a, o=open_storage, **k: storages.append(o(*a, **k)) or storages[-1]
    )
    yield
    for one in storages:
        one.engine.dispose()


@pytest.fixture
def run(opened, tmp_path):
    folder = RunFolder(tmp_path / "run").create()
    folder.study.write_text("search: {trials: 2}\n")
    database = storage.open_storage(default_url(folder.database))
    study = optuna.create_study(storage=database, study_name="demo", direction="maximize")
    study.enqueue_trial({"x": 0.5})
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    return folder, study


def get(app, path, **environ):
    status = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8080",
        "HTTP_HOST": "127.0.0.1:8080",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.url_scheme": "http",
        **environ,
    }
    answer = app(environ, lambda line, headers, exc_info=None: status.append(line))
    body = b"".join(answer)
    # bottle keeps the last response of a thread, with the open file of an artifact in it.
    for piece in (answer, getattr(bottle.response, "body", None)):
        if hasattr(piece, "close"):
            piece.close()
    return status[0], body


def test_the_study_the_note_and_the_figures_are_served(run, record, options, sites):
    folder, study = run
    folder.report_html.write_text("<p>report</p>")
    rows = allocation_rows(options, sites)
    assert publish(study, record, rows, predicted={3: 0.1}, folder=folder) == ()
    app = application(folder.root)
    status, body = get(app, "/api/studies")
    assert status.startswith("200")
    (summary,) = json.loads(body)["study_summaries"]
    assert summary["study_name"] == "demo"

    status, body = get(app, f"/api/studies/{summary['study_id']}", QUERY_STRING="after=0")
    assert status.startswith("200")
    assert len(body) < 200_000
    shown = json.loads(body)
    assert "+5.0 [+2.0, +8.0]" in shown["note"]["body"]
    names = {plot["id"] for plot in shown["plotly_graph_objects"]}
    assert names == {f"autopeft-{n}" for n in ("gain", "allocation", "spending", "history", "curves", "prediction")}
    link = shown["note"]["body"].split("(/artifacts/")[1].split(")")[0]
    assert get(app, f"/artifacts/{link}") == ("200 OK", b"<p>report</p>")


def test_publishing_again_replaces(run, record, options, sites):
    folder, study = run
    folder.report_html.write_text("first")
    publish(study, record, folder=folder)
    folder.report_html.write_text("second")
    assert publish(study, record, allocation_rows(options, sites), folder=folder) == ()
    assert [path.read_text() for path in folder.artifacts.iterdir()] == ["second"]


def test_a_broken_dashboard_is_told_and_never_raises(run, record, monkeypatch, caplog):
    folder, study = run

    def broken(*args, **kwargs):
        raise RuntimeError("the storage is gone")

    monkeypatch.setattr(optuna.Study, "set_user_attr", broken)
    with caplog.at_level(logging.WARNING, "autopeft.report"):
        problems = publish(study, dataclasses.replace(record, trials=()), folder=folder)
    assert [text for text in problems if "the storage is gone" in text]
    assert "does not show the totals" in caplog.text


def test_a_figure_that_is_too_large_is_not_sent(run, record, monkeypatch):
    _, study = run
    monkeypatch.setattr(dashboard, "_MOST_JSON", 10)
    problems = publish(study, record)
    assert problems
    assert all("every poll" in text for text in problems)


def test_a_storage_is_served_by_its_url(run):
    folder, _ = run
    assert get(application(default_url(folder.database)), "/api/studies")[0].startswith("200")


def test_a_run_with_its_study_elsewhere_asks_for_the_url(tmp_path):
    folder = RunFolder(tmp_path / "other").create()
    folder.study.write_text("{}")
    with pytest.raises(StoreError, match="give the URL of the storage"):
        application(folder.root)


def test_a_missing_run_makes_nothing(tmp_path):
    with pytest.raises(StoreError, match="no run folder"):
        application(tmp_path / "missing")
    with pytest.raises(StoreError, match="no storage"):
        application(default_url(tmp_path / "typo.db"))
    assert list(tmp_path.iterdir()) == []


def test_other_sites_and_other_hosts_are_refused_on_loopback():
    def app(environ, start_response):
        start_response("200 OK", [])
        return [b"yes"]

    guarded = dashboard._guarded(app, "127.0.0.1")
    assert get(guarded, "/")[0] == "200 OK"
    assert get(guarded, "/", HTTP_HOST="localhost:8080")[0] == "200 OK"
    assert get(guarded, "/", HTTP_ORIGIN="http://127.0.0.1:8080")[0] == "200 OK"
    assert get(guarded, "/", HTTP_HOST="evil.example:8080")[0] == "403 Forbidden"
    assert get(guarded, "/", HTTP_ORIGIN="http://evil.example")[0] == "403 Forbidden"
    assert dashboard._guarded(app, "0.0.0.0") is app


def test_serving_takes_the_next_free_port_and_answers(run, monkeypatch):
    folder, _ = run
    blocker = dashboard._bind("127.0.0.1", 18080, lambda e, s: [])
    servers, lines = [], []
    monkeypatch.setattr(
        dashboard, "_bind", lambda *args, bind=dashboard._bind: servers.append(bind(*args)) or servers[0]
    )
    thread = threading.Thread(
        target=serve, args=(folder.root, "127.0.0.1", blocker.server_port, lines.append), daemon=True
    )
    thread.start()
    try:
        for _ in range(100):
            if len(lines) == 2:
                break
            thread.join(0.1)
        url = lines[0].split()[2]
        assert int(url.rsplit(":", 1)[1]) > blocker.server_port
        with urllib.request.urlopen(f"{url}/api/studies", timeout=10) as answer:
            assert len(json.load(answer)["study_summaries"]) == 1
    finally:
        servers[0].shutdown()
        thread.join(10)
        blocker.server_close()
    assert not thread.is_alive()


def test_an_address_that_is_not_ours_is_a_usage_error(run):
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1"):
        serve(run[0].root, host="192.0.2.1")
