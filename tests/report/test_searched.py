from __future__ import annotations

import dataclasses

import pytest

from autopeft.core.record import Record
from autopeft.report.html import render_html
from autopeft.report.markdown import render_markdown
from autopeft.report.searched import race_table, search_notes
from autopeft.report.tables import cost_table

RUNG = {
    "epochs": 2,
    "arms": [
        {"name": "core", "status": "done", "kept": True, "nll": 0.5, "behind": 0.0, "bar": 0.1, "worse": False},
        {"name": "spt", "status": "done", "kept": False, "nll": 0.9, "behind": 0.4, "bar": 0.1, "worse": True},
        {"name": "lora", "status": "failed", "kept": False, "nll": None},
    ],
}


@pytest.fixture
def told(record: Record) -> Record:
    search = {
        "goals": [{"name": "top1", "direction": "maximize"}],
        "tier": "race",
        "race": {"entered": 3, "replicates": 2, "sigma_seed": 0.0125, "rungs": [RUNG]},
        "certificate": {"delta": 0.012, "confidence": 0.9, "trials": 8},
        "warm_start": [{"run": "runs/old", "trial": 7, "gain": 0.02, "values": {}}],
    }
    costs = {"scoring": 50.0, "race": 150.0, "baselines": 800.0, "finish": 600.0, "full_training": 200.0}
    return dataclasses.replace(record, search=search, costs=costs)


def test_each_fact_is_a_sentence(told: Record) -> None:
    text = "\n".join(search_notes(told))
    assert "Tier `race`" in text
    assert "With 90% confidence" in text
    assert "more than 1.2 (from 8 values" in text
    assert "seeds alone move the loss by 0.0125" in text
    assert "Started from trial 7 of runs/old, +2.0 over its default." in text


def test_the_race_says_who_was_dropped_and_why(told: Record) -> None:
    assert [row[2:] for row in race_table(told).rows] == [
        ("core", "0.5000", "+0.0000", "0.1000", "goes on"),
        ("spt", "0.9000", "+0.4000", "0.1000", "clearly behind"),
        ("lora", "failed", "", "", "left out"),
    ]


def test_a_record_that_says_nothing(record: Record) -> None:
    assert search_notes(record) == ()
    assert race_table(record).rows == ()


def test_baselines_and_the_end_are_apart_in_the_costs(told: Record) -> None:
    rows = {row[0]: row[1:4] for row in cost_table(told).rows}
    assert rows["race"] == ("150", "0.75", "")
    assert rows["baselines"] == ("800", "", "4.00")
    assert rows["search in all"] == ("1,000", "1.00", "4.00")
    assert rows["finish"] == ("600", "3.00", "")
    assert rows["one full training"] == ("200", "1.00", "")


def test_the_pages_show_it(told: Record) -> None:
    text, page = render_markdown(told), render_html(told)
    assert "## Race" in text
    assert "clearly behind" in text
    assert "<h2>Race</h2>" in page
    assert "Started from trial 7" in page
