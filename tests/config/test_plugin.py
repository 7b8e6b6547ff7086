from __future__ import annotations

from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from autopeft.config._part import explain
from autopeft.config.plugin import Plugin, PluginList, PluginTable, describe
from autopeft.config.study import DEFAULT_METHODS
from autopeft.errors import UnknownPlugin, UsageError
from autopeft.methods.lora import LoRA
from autopeft.methods.sparse import Sparse
from autopeft.rewards.forgetting import Forgetting
from autopeft.rewards.joint import Joint
from autopeft.rewards.metric import Metric
from autopeft.rewards.parameters import Parameters
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.tasks.classification import Classification

TABLE = PluginTable("methods", DEFAULT_METHODS)


def message(marker: Plugin | PluginList | PluginTable, data: Any) -> str:
    with pytest.raises(PydanticCustomError) as caught:
        marker.read(data)
    return str(explain(caught.value, "here"))


def test_a_name_and_a_mapping() -> None:
    scorers = Plugin("scoring")
    assert scorers.read("fisher") == Fisher()
    assert scorers.read({"type": "fisher", "power": 1}) == Fisher(power=1.0)
    assert scorers.read({"type": "fisher", "gradient": {"batch_size": 4}}) == Fisher(Gradient(batch_size=4))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("fischer", r"here: no scorer is called 'fischer'. Did you mean 'fisher'?"),
        ({"power": 1}, "here: a scorer needs `type`, one of calibrated, eva, fisher"),
        ({"type": 3}, "here: a scorer needs `type`"),
        (3, "here: expected the name of a scorer, or a mapping with `type` and settings, got 3"),
        (None, "here: expected the name of a scorer"),
        ({"type": "fisher", "n_batchs": 3}, "here has no key 'n_batchs'. Known: gradient, power, damping."),
        ({"type": "fisher", "power": "half"}, "here.power: expected a number, got 'half'"),
        ({"type": "fisher", "power": 2}, "here: fisher.power must lie between"),
        ({"type": "fisher", "gradient": {"batch": 4}}, "here.gradient has no key 'batch'."),
    ],
)
def test_a_plugin_that_cannot_be_read(data: Any, expected: str) -> None:
    assert message(Plugin("scoring"), data).startswith(expected)


def test_a_list_chooses_and_a_mapping_sets() -> None:
    assert TABLE.read(["lora", "sparse_bias"]) == {"lora": LoRA(), "sparse_bias": Sparse(slot="bias")}
    found = TABLE.read(
        {
            "lora": {"alpha": 8},
            "wide": {"type": "lora", "alpha": 16},
            "sparse_bias": None,
            "sparse": {"slot": "bias"},
            "bias": {"type": "lora"},
        }
    )
    assert found == {
        "lora": LoRA(8.0),
        "wide": LoRA(16.0),
        "sparse_bias": Sparse(slot="bias"),
        "sparse": Sparse(slot="bias"),
        "bias": LoRA(),
    }
    assert list(found) == ["lora", "wide", "sparse_bias", "sparse", "bias"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (["lora", "lora"], "here: the method 'lora' is listed twice"),
        (["lora", 3], "here: expected a list of methods, or a mapping of names to settings"),
        ("lora", "here: expected a list of methods"),
        ({"lora": 3}, "here.lora: expected the name of a method, or a mapping"),
        ({"mine": {}}, "here.mine: no method is called 'mine'."),
        ({"lora": {"alpha": 0}}, "here.lora: lora: alpha must be a positive number"),
        ({"lora": {"alfa": 1}}, "here.lora has no key 'alfa'. Did you mean 'alpha'?"),
    ],
)
def test_a_table_that_cannot_be_read(data: Any, expected: str) -> None:
    assert message(TABLE, data).startswith(expected)


def test_faults_of_several_plugins_are_all_told() -> None:
    lines = message(TABLE, {"lora": {"alpha": 0}, "lroa": {}, "core": None}).splitlines()
    assert [line.split(":")[0] for line in lines] == ["here.lora", "here.lroa"]


def test_a_description_holds_every_setting() -> None:
    assert describe(Sparse(slot="bias"), "methods") == {"type": "sparse", "slot": "bias"}
    assert describe(LoRA(), "methods") == {"type": "lora", "alpha": None, "scaling": "rank"}


def test_a_class_that_no_registry_holds_has_no_description() -> None:
    with pytest.raises(UnknownPlugin, match="is not a registered scorer"):
        describe(LoRA(), "scoring")
    assert issubclass(UnknownPlugin, UsageError)


def test_a_plugin_that_holds_a_list_of_others() -> None:
    rewards = Plugin("rewards")
    data = {"type": "joint", "parts": ["parameters", {"type": "metric", "name": "nll", "direction": "minimize"}]}
    held = rewards.read(data)
    assert held == Joint((Parameters(), Metric("nll", "minimize")))
    assert describe(held, "rewards") == {**data, "parts": [{"type": "parameters"}, data["parts"][1]]}
    assert rewards.read(describe(held, "rewards")) == held


def test_a_plugin_that_holds_another() -> None:
    data = {"type": "forgetting", "source": "digits", "task": {"type": "classification", "augment": "flip"}}
    held = Plugin("rewards").read(data)
    assert held == Forgetting("digits", Classification(augment="flip"))
    assert Plugin("rewards").read(describe(held, "rewards")) == held


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"type": "joint"}, ["here: the key 'parts' is missing"]),
        ({"type": "joint", "parts": "fid"}, ["here.parts: expected a list of rewards, got 'fid'"]),
        ({"type": "joint", "parts": []}, ["here: a joint reward needs at least one part"]),
        (
            {"type": "joint", "parts": ["fidd", {"type": "amd", "space": "sound"}]},
            ["here.parts.0: no reward is called 'fidd'. Did you mean 'fid'?", "here.parts.1.space: expected"],
        ),
        ({"type": "forgetting", "source": "digits", "task": "dancing"}, ["here.task: no task is called 'dancing'"]),
    ],
)
def test_a_held_plugin_that_cannot_be_read(data: Any, expected: list[str]) -> None:
    lines = message(Plugin("rewards"), data).splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_a_list_of_plugins_by_itself() -> None:
    assert PluginList("rewards").read(["parameters"]) == (Parameters(),)
    assert message(PluginList("rewards"), {}) == "here: expected a list of rewards, got {}"
