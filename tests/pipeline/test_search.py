"""One small search from beginning to end, through the command line, and everything that can be done with its folder."""

import json
import sqlite3

import pytest
import torch
from typer.testing import CliRunner

from autopeft.cli.main import app
from autopeft.config.decode import load_study
from autopeft.core.codec import decode
from autopeft.core.record import Record
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.replay import replay


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def finished(small, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    command = ["search", *small, "--data", pictures, "--epochs", "3", "--trials", "3", "--seeds", "3", "-o", folder]
    result = run(*command, "--json")
    assert result.exit_code in (0, 7), result.stderr
    return folder, command, json.loads(result.stdout)


@pytest.fixture(scope="module")
def record(finished):
    return decode(Record, json.loads((finished[0] / "record.json").read_text()))


def test_the_json_object_names_run_best_baselines_and_exports(finished):
    folder, _, data = finished
    assert data["schema"] == "autopeft.record/1"
    assert data["run"] == str(folder)
    assert data["best"]["role"] in ("trial", "default")
    assert len(data["baselines"]) == 2
    assert all(b["role"] == "baseline" and b["seeds"] == 3 for b in data["baselines"])
    kinds = {row["kind"] for row in data["exports"]}
    assert {"delta", "native"} <= kinds | {"delta"}
    for row in data["exports"]:
        assert list((folder / "exports" / row["kind"]).iterdir())


def test_every_plan_keeps_to_the_budget(record, finished):
    limit = record.budget["limit"]
    assert record.trials
    for trial in record.trials:
        plan = read_plan(finished[0] / trial.plan)
        assert plan.allocation.spent == trial.spent <= limit
        assert trial.outcome.trainable == plan.allocation.trainable


def test_baselines_and_default_come_first_and_do_not_count(record):
    roles = [t.role for t in record.trials]
    assert roles.count("trial") == 3
    assert roles.count("default") == 1
    assert roles[-3:] == ["trial"] * 3
    names = " ".join(t.name for t in record.trials if t.role == "baseline")
    for word in ("head only", "uniform lora", "spt", "random mix"):
        assert word in names
    first = next(t for t in record.trials)
    assert all(set(t.knobs) == set(first.knobs) for t in record.trials)


def test_the_taken_plan_has_the_least_loss_at_the_best_temperature(record):
    ours = {t.number: t.outcome.metrics for t in record.trials if t.role in ("trial", "default") and t.rewards}
    assert record.search["chosen_by"] == "scaled_nll"
    assert record.best == min(ours, key=lambda number: (ours[number]["scaled_nll"], -ours[number]["top1"], number))


def test_finalists_share_seeds_and_the_test_split(record):
    seeds = [[o.seed for o in c.outcomes] for c in record.contenders]
    assert seeds == [[0, 1, 2]] * 3
    assert {o.split for c in record.contenders for o in c.outcomes} == {"test"}
    winner, *others = record.contenders
    for other in others:
        pairs = zip(winner.outcomes, other.outcomes, strict=True)
        mean = sum(w.metrics["top1"] - o.metrics["top1"] for w, o in pairs) / 3
        assert other.gain == pytest.approx(mean)
        assert other.interval[0] - 1e-9 <= other.gain <= other.interval[1] + 1e-9


def test_no_two_finished_trials_are_the_same_training(finished):
    with sqlite3.connect(finished[0] / "study.db") as db:
        keys = [row[0] for row in db.execute("select value_json from trial_user_attributes where key = 'key'")]
    assert len(keys) == len(set(keys))


def test_the_same_command_continues_and_changes_nothing(finished, record):
    folder, command, data = finished
    again = run(*command, "--json")
    assert again.exit_code in (0, 7), again.stderr
    repeated = json.loads(again.stdout)
    for key in ("best", "baselines", "trials", "exports", "costs"):
        assert repeated[key] == data[key]
    after = decode(Record, json.loads((folder / "record.json").read_text()))
    assert [(t.number, t.name, t.outcome.metrics) for t in after.trials] == [
        (t.number, t.name, t.outcome.metrics) for t in record.trials
    ]


def test_more_trials_are_added_to_the_same_study(finished):
    folder, command, _ = finished
    wanted = [*command[: command.index("--trials")], "--trials", "4", *command[command.index("--trials") + 2 :]]
    result = run(*wanted, "--json")
    assert result.exit_code in (0, 7), result.stderr
    counts = json.loads(result.stdout)["trials"]
    # Four trials, one default plan and the baselines.
    trials = json.loads((folder / "record.json").read_text())["trials"]
    assert sum(t["role"] == "trial" for t in trials) == 4
    assert sum(counts.values()) == len(trials)


def test_other_settings_are_refused_in_the_same_folder(finished):
    _, command, _ = finished
    result = run(*command, "--seed", "5")
    assert result.exit_code == 6
    assert "seed was 0 and is 5 now" in result.stderr


def test_a_trial_replays_to_its_metric_from_its_plan(finished, record, tmp_path):
    trial = next(t for t in record.trials if t.role == "default")
    done = replay(read_plan(finished[0] / trial.plan), tmp_path / "again")
    assert done.result.outcome.metrics == trial.outcome.metrics


def test_train_export_and_eval_from_the_command_line(finished, record, tmp_path, pictures):
    folder, _, _ = finished
    trial = next(t for t in record.trials if t.role == "baseline" and "head" not in t.name)
    trained = run("train", folder / trial.plan, "-o", tmp_path / "trained", "--json")
    assert trained.exit_code == 0, trained.stderr
    assert json.loads(trained.stdout)["outcome"]["metrics"] == dict(trial.outcome.metrics)
    exported = run("export", tmp_path / "trained", "--to", "timm", "--json")
    assert exported.exit_code == 0, exported.stderr
    path = json.loads(exported.stdout)["exports"][0]["path"]
    evaluated = run("eval", path, "--data", pictures, "--split", "outer", "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["metrics"]["top1"] == pytest.approx(trial.outcome.metrics["top1"])


def test_reports(finished):
    folder, _, _ = finished
    text = run("report", folder)
    assert text.exit_code == 0
    assert "gain of the winner" in text.stdout
    assert json.loads(run("report", folder, "--json").stdout)["schema"] == "autopeft.record/1"
    assert "plan" in run("report", folder, "--format", "md").stdout
    html = (folder / "report.html").read_text()
    assert "<html" in html
    rows = (folder / "leaderboard.csv").read_text().splitlines()
    assert rows[0].startswith("trial,name,role,status")


def test_the_study_file_gives_the_study_back(finished):
    folder, _, _ = finished
    study = load_study([folder / "study.yaml"], {})
    assert study.search.trials == 4
    assert study.budget == "5%"


def test_studies_are_listed(finished):
    result = run("study", "ls", finished[0], "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["studies"][0]["name"] == "first"


def test_a_finished_study_leaves_a_worker_nothing_to_do(finished):
    result = run("worker", finished[0])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("0 trials")


def test_dry_run_writes_nothing(small, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("search", *small, "--data", pictures, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["budget"]["limit"] == found["base_parameters"] * 5 // 100
    assert not list(tmp_path.iterdir())
    assert torch.is_grad_enabled()
