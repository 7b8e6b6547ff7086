"""`kill -9` in the middle of a trial, then the same command again: the record is that of a run nobody killed."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from autopeft.testing.tiny_denoiser import tiny_pipeline

TRIALS = 3


def command(flags, folder):
    return [sys.executable, "-m", "autopeft", "search", *flags, "--trials", str(TRIALS), "-o", str(folder), "--json"]


@pytest.fixture
def classifier(small, pictures):
    return [*small, "--data", str(pictures), "--epochs", "6", "search.tries=1"]


@pytest.fixture
def denoiser(tmp_path):
    """Quality within a limit on memorisation."""
    model = f"diffusers:{tiny_pipeline(tmp_path / 'model')}"
    flags = ["--task", "diffusion", "--model", model, "--data", "digits?planted=2&repeat=2", "--budget", "3%"]
    flags += ["--methods", "lora,bias", "--epochs", "6", "--seeds", "1", "--contenders", "head_only"]
    reward = (
        "reward={type: joint, parts: [denoising_loss, {type: noise_difference, draws: 2}, {type: kid, samples: 6}]}"
    )
    settings = ["data.max_samples=60", "task.steps=2", "task.draws=1", "search.tries=1", reward]
    return [*flags, *settings, "search.limits.noise_difference_max=1.0", "device=cpu"]


def start(args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def running_trials(database):
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
            return db.execute(
                "select count(*) from trials t join trial_params p on p.trial_id = t.trial_id where t.state = 'RUNNING'"
            ).fetchone()[0]
    except sqlite3.Error:
        return 0


def kill_in_a_trial(process, folder, place):
    """Kill the process while the trial at this place runs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        if (folder / "plans" / f"{place:04d}.json").exists() and running_trials(folder / "study.db"):
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail("the trial never began")


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "run", "peak_bytes")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", ["classifier", pytest.param("denoiser", marks=pytest.mark.slow)])
def test_a_killed_search_ends_like_one_that_was_not(kind, request, tmp_path):
    flags = request.getfixturevalue(kind)
    whole, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    unhurt = start(command(flags, whole))
    out, err = unhurt.communicate(timeout=240)
    assert unhurt.returncode in (0, 7), err
    first_trial = next(t for t in json.loads((whole / "record.json").read_text())["trials"] if t["role"] == "trial")

    kill_in_a_trial(start(command(flags, killed)), killed, first_trial["number"] + 1)
    assert not (killed / "record.json").exists()
    again = start(command(flags, killed))
    out, err = again.communicate(timeout=240)
    assert again.returncode in (0, 7), err
    assert out.startswith("{")

    with sqlite3.connect(killed / "study.db") as db:
        states = dict(db.execute("select state, count(*) from trials group by state").fetchall())
        keys = [r[0] for r in db.execute("select value_json from trial_user_attributes where key = 'key'")]
    assert states.pop("FAIL", 0) >= 1, "the kill hit no trial"
    assert set(states) <= {"COMPLETE", "PRUNED"}
    assert len(keys) == len(set(keys))
    records = [without_times(json.loads((folder / "record.json").read_text())) for folder in (whole, killed)]
    assert sum(t["role"] == "trial" for t in records[1]["trials"]) == TRIALS
    assert records[0] == records[1]
