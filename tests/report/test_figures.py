import dataclasses
import json

import pytest

from autopeft.core.outcome import Outcome
from autopeft.core.record import Trial
from autopeft.core.site import Site
from autopeft.report._plot import thin
from autopeft.report.figures import allocation_map, figures, gain_figure, history, sensitivity_map, spending_by_depth
from autopeft.report.rows import AllocationRow, allocation_rows


def data(figure):
    return json.loads(figure.to_json())["data"]


def test_every_figure_there_is_data_for(record, options, sites):
    rows = allocation_rows(options, sites)
    found = figures(record, rows, sensitivity={sites[0].name: 1.0}, sites=sites, predicted={3: 0.1})
    assert list(found) == ["gain", "allocation", "spending", "sensitivity", "history", "curves", "prediction"]
    bare = dataclasses.replace(record, trials=(), contenders=(), best=-1)
    assert figures(bare) == {}


def test_the_maps_cells_are_the_plans_costs(options, sites):
    (heat,) = data(allocation_map(allocation_rows(options, sites)))
    assert heat["y"] == ["attn.qkv", "mlp.fc1"]
    assert heat["z"] == [[16, 16], [None, 8]]
    assert heat["text"][0] == ["core 4", "core 4"]


def test_sensitivity_is_a_share_of_the_whole(sites):
    (heat,) = data(sensitivity_map({"blocks.0.attn.qkv": 1.0, "blocks.1.mlp.fc1": 3.0}, sites))
    assert heat["z"] == [[25.0, None], [None, 75.0]]


def test_bars_stack_to_the_plan(options, sites):
    bars = data(spending_by_depth(allocation_rows(options, sites)))
    assert {bar["name"]: bar["y"] for bar in bars} == {"core": [16, 16], "bias": [0, 8]}


def test_gain_bars_reach_to_the_interval(record):
    (marks,) = data(gain_figure(record))
    assert marks["y"] == ["head only", "uniform lora (attn)"]
    assert marks["x"] == [10.0, 5.0]
    assert marks["error_x"]["array"] == pytest.approx([3.0, 3.0])
    assert marks["error_x"]["arrayminus"] == pytest.approx([3.0, 3.0])


def test_best_so_far_never_falls(record):
    line = next(trace for trace in data(history(record)) if trace["mode"] == "lines")
    assert line["x"] == [0, 1, 2, 3, 4]
    assert line["y"] == [0.8, 0.85, 0.86, 0.9, 0.9]


def test_best_so_far_falls_where_less_is_better(record):
    trials = tuple(
        dataclasses.replace(t, outcome=dataclasses.replace(t.outcome, metrics={"nll": 1 - v}))
        for t, v in zip(record.trials[:4], (0.8, 0.85, 0.84, 0.9), strict=True)
    )
    smaller = dataclasses.replace(
        record, trials=trials, contenders=(), study={"reward": {"name": "nll", "direction": "minimize"}}
    )
    line = next(trace for trace in data(history(smaller)) if trace["mode"] == "lines")
    assert line["y"] == pytest.approx([0.2, 0.15, 0.1, 0.1])


def test_thin_keeps_both_ends():
    curve = [(i, float(i)) for i in range(1000)]
    kept = thin(curve)
    assert len(kept) == 60
    assert (kept[0], kept[-1]) == (curve[0], curve[-1])
    assert [epoch for epoch, _ in kept] == sorted({epoch for epoch, _ in kept})


def test_a_large_run_stays_below_twenty_kilobytes(record):
    metrics = {"top1": 0.123456789}
    curve = tuple((epoch, 0.123456789 * epoch) for epoch in range(1, 301))
    trials = tuple(
        Trial(n, f"trial {n} with a rather long name", "trial", {}, "d", 9, {}, Outcome("done", metrics, curve), (0.1,))
        for n in range(1000)
    )
    sites = [
        Site(f"b{d}.{r}", f"b{d}.{r}", "linear", (4, 4), True, d, f"stage.role{r}", ("weight",))
        for d in range(48)
        for r in range(12)
    ]
    rows = [AllocationRow(s.name, "weight", "bottleneck", 1234, 5678, 0.1, s.role, s.depth) for s in sites]
    large = dataclasses.replace(record, trials=trials, best=7)
    found = figures(
        large,
        rows,
        sensitivity={s.name: 0.123456789 for s in sites},
        sites=sites,
        predicted={t.number: 0.123456789 for t in trials},
    )
    assert {name: len(f.to_json()) for name, f in found.items() if len(f.to_json()) > 20_000} == {}
