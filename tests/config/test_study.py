from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from autopeft.config.study import DEFAULT_METHODS, DataSettings, SearchSettings, Study
from autopeft.errors import UnknownKey, UsageError
from autopeft.search.tpe import TPE


def test_the_default_study_is_the_bundled_task_with_every_method(default: Study) -> None:
    assert default.model.spec == "bundled:vit_tiny_fashion"
    assert default.data.spec == "digits"
    assert default.budget == "0.1%"
    assert list(default.methods) == list(DEFAULT_METHODS)
    assert {key: type(method).__name__ for key, method in default.methods.items()} == {
        "lora": "LoRA",
        "core": "Core",
        "sparse": "Sparse",
        "sparse_bias": "Sparse",
        "bias": "Bias",
        "vector": "Vector",
        "norm": "Norm",
        "ssf": "SSF",
        "adapter": "BottleneckAdapter",
        "block_adapter": "BlockAdapter",
        "tokens": "Tokens",
    }
    assert default.search == SearchSettings(trials=10, time_limit=None, space="mixed_methods", seeds=3, tries=2)
    assert default.search.sampler == TPE(startup=10)
    assert (default.search.front, default.goals.mode, default.spend) == ("auto", "first", 1.0)
    names = [type(getattr(default, n)).__name__ for n in ("scorer", "allocator", "backend", "task", "reward")]
    assert names == ["Fisher", "Knapsack", "Native", "Classification", "Metric"]


def test_a_study_is_frozen(default: Study) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "written in version 2 of the format, this autopeft reads 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": True}, "seed must be a whole number"),
        ({"fused": "whoel"}, "fused must be one of whole, slices, both, got 'whoel'"),
        ({"device": " "}, "device is empty"),
        ({"methods": {}}, "methods is empty"),
        ({"budget": "0"}, "a budget of '0' buys nothing"),
        ({"budget": "a lot"}, "cannot read the budget 'a lot'"),
    ],
)
def test_a_study_is_checked(default: Study, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(default, **change)


def test_budgets_that_need_the_model_are_left_to_it(default: Study) -> None:
    assert dataclasses.replace(default, budget="like:lora-r8").budget == "like:lora-r8"
    assert dataclasses.replace(default, budget="0.000001%").budget == "0.000001%"


def test_a_multiplier_of_a_method_nobody_knows_is_a_typing_error(default: Study) -> None:
    gain = dataclasses.replace(default.gain, methods={"lroa": 2.0})
    with pytest.raises(UnknownKey, match=r"gain\.methods has no method 'lroa'\. Did you mean 'lora'\?"):
        dataclasses.replace(default, gain=gain)
    only_core = {"core": default.methods["core"]}
    known = dataclasses.replace(default.gain, methods={"lora": 2.0})
    assert dataclasses.replace(default, gain=known, methods=only_core).gain.methods == {"lora": 2.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spec": " "}, "data.spec is empty"),
        ({"batch_size": 0}, "data.batch_size must be a whole number of at least 1, got 0"),
        ({"max_inner": 0}, "data.max_inner"),
        ({"max_samples": -5}, "data.max_samples"),
        ({"workers": -1}, "data.workers"),
        ({"val_frac": 1.0}, "data.val_frac must be at least 0 and below 1, got 1.0"),
        ({"test_frac": -0.1}, "data.test_frac"),
    ],
)
def test_data_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DataSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": -1}, "search.trials"),
        ({"seeds": 0}, "search.seeds must be a whole number of at least 1, got 0"),
        ({"tries": 0}, "search.tries"),
        ({"time_limit": 0.0}, "search.time_limit must be more than 0 seconds, got 0.0"),
        ({"space": ""}, "search.space is empty"),
    ],
)
def test_search_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spend": 0.0}, "spend must be above 0 and at most 1, got 0.0"),
        ({"search": SearchSettings(limits={"f1": 0.5})}, "search.limits has no goal 'f1'; the reward's are top1"),
        ({"search": SearchSettings(front="epsilon")}, "needs a limit on a goal"),
    ],
)
def test_goals_and_limits_must_fit_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Study(**values)


def test_importing_the_study_imports_no_torch() -> None:
    code = "import sys, autopeft.config.study; sys.exit(bool({'torch', 'timm', 'optuna', 'peft'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
