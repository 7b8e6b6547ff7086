from __future__ import annotations

from typing import Any

import pytest

from autopeft.config.merge import merge


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"seed": 1}, {"budget": "1%"}, {"seed": 1, "budget": "1%"}),
        ({"seed": 1}, {"seed": 2}, {"seed": 2}),
        (
            {"train": {"epochs": 3, "lr": {"core": 1}}},
            {"train": {"lr": {"head": 2}}},
            {"train": {"epochs": 3, "lr": {"core": 1, "head": 2}}},
        ),
        ({"train": {"betas": [1, 2]}}, {"train": {"betas": [3]}}, {"train": {"betas": [3]}}),
        ({"train": {"threads": 2}}, {"train": {"threads": None}}, {"train": {"threads": None}}),
        # a plug-in keeps its settings, unless it becomes another
        ({"scorer": "fisher"}, {"scorer": {"power": 1}}, {"scorer": {"type": "fisher", "power": 1}}),
        (
            {"scorer": {"type": "fisher", "power": 1}},
            {"scorer": "fisher"},
            {"scorer": {"type": "fisher", "power": 1}},
        ),
        ({"scorer": {"type": "fisher", "power": 1}}, {"scorer": "random"}, {"scorer": {"type": "random"}}),
        (
            {"scorer": {"type": "fisher", "gradient": {"a": 1, "b": 2}}},
            {"scorer": {"gradient": {"b": 3}}},
            {"scorer": {"type": "fisher", "gradient": {"a": 1, "b": 3}}},
        ),
        # methods: a list chooses, a mapping adds and adjusts
        ({"methods": {"lora": {"alpha": 8}, "core": None}}, {"methods": ["lora"]}, {"methods": {"lora": {"alpha": 8}}}),
        ({"methods": ["core"]}, {"methods": ["lora"]}, {"methods": {"lora": None}}),
        (
            {"methods": ["lora", "core"]},
            {"methods": {"lora": {"alpha": 8}, "bias": None}},
            {"methods": {"lora": {"alpha": 8}, "core": None, "bias": None}},
        ),
        (
            {"methods": {"x": {"type": "lora", "alpha": 8}}},
            {"methods": {"x": {"type": "core"}}},
            {"methods": {"x": {"type": "core"}}},
        ),
        # a plug-in inside of a part: another type leaves nothing of its settings
        (
            {"search": {"trials": 3, "sampler": {"type": "tpe", "startup": 5}}},
            {"search": {"sampler": {"type": "gp"}}},
            {"search": {"trials": 3, "sampler": {"type": "gp"}}},
        ),
        # what is wrong is kept as it is, for the decoder to name
        ({"train": 3}, {"train": {"epochs": 2}}, {"train": {"epochs": 2}}),
        ({"scorer": 3}, {"scorer": "fisher"}, {"scorer": {"type": "fisher"}}),
        ({"methods": ["lora"]}, {"methods": ["core", "core"]}, {"methods": ["core", "core"]}),
        ({"nonsense": 1}, {"nonsense": 2}, {"nonsense": 2}),
    ],
)
def test_later_files_win(base: dict[str, Any], over: dict[str, Any], merged: dict[str, Any]) -> None:
    before = repr((base, over))
    assert merge(base, over) == merged
    assert repr((base, over)) == before, "neither is changed"


def test_merging_with_nothing_changes_nothing() -> None:
    data = {"methods": ["lora"], "scorer": "fisher", "train": {"epochs": 1}}
    assert merge(data, {}) == data
    assert merge({}, data) == data
