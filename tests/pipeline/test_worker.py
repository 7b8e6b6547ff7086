"""A second process joins a running search."""

import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest

TRIALS = 6


def start(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "autopeft", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def searched(database):
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
            query = "select count(*) from trial_user_attributes where key = 'role' and value_json = '\"trial\"'"
            return db.execute(query).fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.slow
def test_two_processes_share_the_trials(small, pictures, tmp_path):
    folder = tmp_path / "run"
    flags = ["--epochs", "30", "--trials", TRIALS, "-o", folder, "search.tries=1", "--json"]
    search = start("search", *small, "--data", pictures, *flags)
    deadline = time.monotonic() + 240
    while searched(folder / "study.db") < 1:
        assert search.poll() is None, search.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    joined = start("worker", folder)
    out, err = joined.communicate(timeout=240)
    assert joined.returncode == 0, err
    _, search_err = search.communicate(timeout=240)
    assert search.returncode in (0, 7), search_err
    record = json.loads((folder / "record.json").read_text())
    trials = [t for t in record["trials"] if t["role"] == "trial"]
    assert len(trials) == TRIALS
    assert len({t["number"] for t in record["trials"]}) == len(record["trials"])
    assert out.endswith("trials done by this worker\n")
