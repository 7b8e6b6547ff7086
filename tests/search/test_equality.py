from __future__ import annotations

import dataclasses

import numpy as np

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Place
from autopeft.search.equality import equality_key
from autopeft.training.settings import LearningRates, TrainSettings


@dataclasses.dataclass(frozen=True)
class LoRA:
    alpha: float = 8.0


@dataclasses.dataclass(frozen=True)
class Other:
    alpha: float = 8.0


def _plan(size: int = 2, gain: float = 1.0, entries: tuple[int, ...] | None = None) -> Allocation:
    indices = None if entries is None else Indices(np.array(entries, dtype=np.int64))
    option = Option("fc", "lora", size, Cost.plain(10, 10), gain, (Place("fc", "weight"),), indices)
    return Allocation((option,), Budget(100))


def _key(**changes: object) -> str:
    facts: dict[str, object] = {
        "allocation": _plan(),
        "methods": {"lora": LoRA(), "bias": Other()},
        "train": TrainSettings(),
        "data_hash": "d",
        "seed": 0,
        "fidelity": 9,
    }
    return equality_key(**{**facts, **changes})  # type: ignore[arg-type]


def test_what_makes_a_training() -> None:
    keys = {
        "as it is": _key(),
        "plan": _key(allocation=_plan(size=3)),
        "entries": _key(allocation=_plan(entries=(1, 2))),
        "other entries": _key(allocation=_plan(entries=(1, 3))),
        "settings of a method": _key(methods={"lora": LoRA(4.0)}),
        "method": _key(methods={"lora": Other()}),
        "train": _key(train=TrainSettings(lr=LearningRates(core=0.5))),
        "data": _key(data_hash="e"),
        "seed": _key(seed=1),
        "fidelity": _key(fidelity=3),
    }
    assert len(set(keys.values())) == len(keys)
    assert all(len(key) == 64 for key in keys.values())


def test_what_does_not() -> None:
    assert _key() == _key(allocation=_plan(gain=99.0))
    assert _key() == _key(methods={"lora": LoRA()})  # a method that the plan does not use
    assert _key() == _key(methods={"bias": LoRA(), "lora": LoRA()})
