from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autopeft.config.override import override, parse_assignments
from autopeft.config.study import Study
from autopeft.errors import UnknownKey, UnknownPlugin, UsageError
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.regularisers.distillation import Distillation
from autopeft.regularisers.l2_start import L2Start
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.magnitude import Magnitude


def test_a_new_study_and_the_old_one_as_it_was(default: Study) -> None:
    before = repr(default)
    study = override(default, {"methods.lora.alpha": 8, "train.lr.core": 0.5, "gain.methods.lora": 0.25, "seed": 3})
    assert study.methods["lora"] == LoRA(8.0)
    assert list(study.methods) == list(default.methods)
    assert study.train.lr == dataclasses.replace(default.train.lr, core=0.5)
    assert study.gain.methods == {"lora": 0.25}
    assert study.seed == 3
    assert repr(default) == before
    assert override(default, {}) == default


def test_whole_parts_are_replaced_before_what_is_in_them(default: Study) -> None:
    assert override(default, {"scorer": "magnitude"}).scorer == Magnitude()
    assert override(default, {"scorer": {"type": "fisher", "power": 1}}).scorer == Fisher(power=1.0)
    assert override(default, {"methods": ["lora"], "methods.lora.alpha": 2}).methods == {"lora": LoRA(2.0)}
    assert override(default, {"methods.lora": {"alpha": 2}}).methods["lora"] == LoRA(2.0)
    assert override(default, {"methods.lora.alpha": 4, "methods": ["lora"]}).methods == {"lora": LoRA()}


def test_another_type_leaves_nothing_of_the_settings(default: Study) -> None:
    assert override(default, {"scorer.type": "gradient", "scorer.batch_size": 3}).scorer == Gradient(batch_size=3)
    assert override(default, {"methods.lora.type": "core"}).methods["lora"] == Core()


def test_open_tables_take_new_names(default: Study) -> None:
    study = override(default, {"gain.roles.qkv": 2, "model.kwargs.a": True, "model.kwargs.b.c": [1]})
    assert study.gain.roles == {"qkv": 2.0}
    assert type(study.gain.roles["qkv"]) is float
    assert study.model.kwargs == {"a": True, "b": {"c": [1]}}


def test_settings_that_depend_on_each_other_are_checked_together(default: Study) -> None:
    first = override(default, {"model.img_size": 32, "model.kwargs.img_size": 32})
    both = override(first, {"model.img_size": 64, "model.kwargs.img_size": 64})
    assert (both.model.img_size, both.model.kwargs) == (64, {"img_size": 64})
    with pytest.raises(UsageError, match="given twice and differs"):
        override(first, {"model.img_size": 64})


@pytest.mark.parametrize(
    ("path", "value", "kind", "message"),
    [
        (
            "methods.lroa.alpha",
            8,
            UnknownKey,
            r"^study\.methods has no key 'lroa'\. Did you mean 'lora'\? Known: lora, ",
        ),
        ("methods.lora.alhpa", 8, UnknownKey, r"^study\.methods\.lora has no key 'alhpa'\. Did you mean 'alpha'\?"),
        ("trian.epochs", 8, UnknownKey, r"^study has no key 'trian'\. Did you mean 'train'\?"),
        ("train.lr.cre", 8, UnknownKey, r"^study\.train\.lr has no key 'cre'\. Did you mean 'core'\?"),
        ("train.epochs.max", 8, UnknownKey, r"^study\.train\.epochs is a single value and has no key 'max'$"),
        ("gain.methods.lroa", 2, UnknownKey, r"gain\.methods has no method 'lroa'\. Did you mean 'lora'\?"),
        ("gain.roles.qvk", 2, UsageError, r"gain\.roles has no group 'qvk'"),
        ("gain.exponent", 3, UsageError, r"^gain\.exponent must be above 0 and at most 1, got 3\.0$"),
        ("methods.lora.alpha", -1, UsageError, r"^study\.methods\.lora: lora: alpha must be a positive number"),
        ("methods.lora.alpha", "x", UsageError, r"^study\.methods\.lora\.alpha: expected a number, got 'x'$"),
        ("train.epochs", True, UsageError, r"^study\.train\.epochs: expected a whole number, got True$"),
        ("train.epochs", 2.0, UsageError, r"^study\.train\.epochs: expected a whole number, got 2\.0$"),
        ("seed", "x", UsageError, r"^study\.seed: expected a whole number, got 'x'$"),
        ("scorer.gradient.n", 1, UnknownKey, r"^study\.scorer\.gradient has no key 'n'"),
        ("methods", [], UsageError, r"methods is empty"),
        ("version", 3, UsageError, r"version 3 of the format"),
    ],
)
def test_what_cannot_be_set(default: Study, path: str, value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        override(default, {path: value})
    assert type(caught.value) is kind


def test_assignments_are_read_as_yaml() -> None:
    found = parse_assignments(
        [
            "a.b=1e-4",
            "c=no",
            "d=",
            "e=[lora, core]",
            "budget=0.1%",
            "data.spec=csv:f?image=a&label=b",
            "c=true",
            " f =1",
        ]
    )
    assert found == {
        "a.b": 1e-4,
        "d": None,
        "e": ["lora", "core"],
        "budget": "0.1%",
        "data.spec": "csv:f?image=a&label=b",
        "c": True,
        "f": 1,
    }
    assert list(found)[-2] == "c", "the last of one path counts, and where it stands"


@pytest.mark.parametrize("text", ["train.epochs", "=3", "a..b=3", ".a=3", "a.=3", ""])
def test_what_is_no_assignment(text: str) -> None:
    with pytest.raises(UsageError, match=r"write a setting as KEY\.PATH=VALUE"):
        parse_assignments([text])


def test_a_value_that_is_no_yaml_is_named() -> None:
    with pytest.raises(UsageError, match=r"the value of train\.betas, line 1"):
        parse_assignments(["train.betas=[1,"])


def test_setting_something_of_a_regulariser_adds_it(default: Study) -> None:
    assert default.regularisers == {}
    study = override(default, parse_assignments(["regularisers.distillation.weight=0.5"]))
    assert study.regularisers == {"distillation": Distillation(0.5)}
    more = override(study, {"regularisers.l2_start.pull": "sign", "regularisers.distillation.temperature": 4})
    assert more.regularisers == {"distillation": Distillation(0.5, 4.0), "l2_start": L2Start(pull="sign")}
    named = override(default, {"regularisers.soft.type": "l2_start", "regularisers.soft.weight": 2})
    assert named.regularisers == {"soft": L2Start(2.0)}
    assert override(default, {"regularisers.l2_start": {"weight": 3}}).regularisers == {"l2_start": L2Start(3.0)}
    assert override(default, {"regularisers.l2_start": None}).regularisers == {"l2_start": L2Start()}
    assert override(default, {"regularisers": ["l2_start"]}).regularisers == {"l2_start": L2Start()}
    assert override(more, {"regularisers": []}).regularisers == {}


@pytest.mark.parametrize(
    ("path", "value", "kind", "message"),
    [
        ("regularisers.distilation.weight", 1, UnknownKey, "has no key 'distilation'. Did you mean 'distillation'?"),
        ("regularisers.distilation", None, UnknownPlugin, "Did you mean 'distillation'?"),
        ("regularisers.distillation.wieght", 1, UnknownKey, "has no key 'wieght'. Did you mean 'weight'?"),
        ("regularisers.distillation.weight", "much", UsageError, "study.regularisers.distillation.weight: expected a"),
        ("regularisers.distillation.weight", -1, UsageError, "distillation: weight must be a number of at least 0"),
        ("regularisers.x.type", "l3_start", UnknownPlugin, "Did you mean 'l2_start'?"),
        ("regularisers.x.pull", "sign", UnknownKey, "Known: consistency, distillation, dr_tune"),
    ],
)
def test_a_regulariser_that_is_misspelt(default: Study, path: str, value: Any, kind: type, message: str) -> None:
    with pytest.raises(kind) as caught:
        override(default, {path: value})
    assert message in str(caught.value)


def test_a_method_is_added_as_a_whole(default: Study) -> None:
    """By its own name, or by any name with a type; setting one thing of a method that is not there stays an error."""
    found = override(default, {"methods.flora": {"kernel_rank": 1}, "methods.small": {"type": "lora", "alpha": 2}})
    assert list(found.methods) == [*default.methods, "flora", "small"]
    assert found.methods["flora"].kernel_rank == 1
    assert found.methods["small"].alpha == 2
    with pytest.raises(UnknownKey, match="no key 'flora'"):
        override(default, {"methods.flora.kernel_rank": 1})
    with pytest.raises(UsageError, match="'florra'"):
        override(default, {"methods.florra": {}})
