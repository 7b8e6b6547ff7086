"""A small finished run whose numbers are easy to work out by hand."""

from __future__ import annotations

import pytest

from autopeft.core.outcome import Outcome
from autopeft.core.record import Contender, Record, Trial
from autopeft.core.site import Site


def outcome(value: float, seed: int = 0, split: str = "outer", epochs: int = 3) -> Outcome:
    curve = tuple((epoch, value * epoch / epochs) for epoch in range(1, epochs + 1))
    return Outcome("done", {"top1": value, "nll": 1 - value}, curve, 100, 2.0, 0, seed, split)  # type: ignore[arg-type]


def trial(number: int, name: str, role: str, value: float | None, spent: int = 100) -> Trial:
    if value is None:
        failed = Outcome("pruned", curve=((1, 0.1),), reason="stopped after 1 epochs")
        return Trial(number, name, role, {}, f"d{number}", spent, {"core": spent}, failed)  # type: ignore[arg-type]
    mix = {"core": 3 * spent // 4, "bias": spent // 4} if spent else {}
    return Trial(number, name, role, {}, f"d{number}", spent, mix, outcome(value), (value,), 500)  # type: ignore[arg-type]


def contender(name: str, number: int, role: str, values: tuple[float, ...], gain: float, low: float, high: float):
    outcomes = tuple(outcome(value, seed, "test") for seed, value in enumerate(values))
    spent = 0 if name == "head only" else 100
    return Contender(name, number, role, spent, outcomes, gain, (low, high))  # type: ignore[arg-type]


@pytest.fixture
def sites() -> tuple[Site, ...]:
    found = []
    for depth in range(2):
        found.append(_linear(f"blocks.{depth}.attn.qkv", depth, "attn.qkv", (12, 4)))
        found.append(_linear(f"blocks.{depth}.mlp.fc1", depth, "mlp.fc1", (8, 4)))
    return tuple(found)


def _linear(name: str, depth: int, role: str, shape: tuple[int, int]) -> Site:
    return Site(name, name, "linear", shape, True, depth, role, ("weight", "bias"))


@pytest.fixture
def options() -> list[dict[str, object]]:
    return [
        {"site": "blocks.1.mlp.fc1", "slot": "bias", "method": "bias", "size": 1, "cost": 8, "gain": 0.5},
        {"site": "blocks.0.attn.qkv", "slot": "weight", "method": "core", "size": 4, "cost": 16, "gain": 2.0},
        {"site": "blocks.1.attn.qkv", "slot": "weight", "method": "core", "size": 4, "cost": 16, "gain": 1.0},
    ]


@pytest.fixture
def record() -> Record:
    trials = (
        trial(0, "head only", "baseline", 0.80, 0),
        trial(1, "uniform lora (attn)", "baseline", 0.85),
        trial(2, "default plan", "default", 0.86),
        trial(3, "trial 3", "trial", 0.90),
        trial(4, "trial 4", "trial", None),
    )
    contenders = (
        contender("trial 3", 3, "trial", (0.90, 0.92), 0.0, 0.0, 0.0),
        contender("uniform lora (attn)", 1, "baseline", (0.86, 0.86), 0.05, 0.02, 0.08),
        contender("head only", 0, "baseline", (0.80, 0.82), 0.10, 0.07, 0.13),
    )
    return Record(
        run="runs/demo",
        study={"reward": {"type": "metric", "name": "top1", "direction": "maximize"}},
        model={"name": "tiny", "n_base": 100_000, "n_head": 40, "fingerprint": "0123456789ab"},
        data={"spec": "toy", "classes": ["a", "b"], "sizes": {"inner": 32, "outer": 16, "test": 16}, "data_hash": "x"},
        budget={"limit": 100, "unit": "trainable", "text": "0.1%", "share_of": 100_000},
        trials=trials,
        best=3,
        contenders=contenders,
        exports={"timm": "exports/timm", "native": "exports/native"},
        costs={"scores": 50.0, "search": 400.0, "full_training": 200.0},
        environment={"device": "cpu", "threads": 1},
        seconds={"scores": 1.0, "search": 75.0},
    )
