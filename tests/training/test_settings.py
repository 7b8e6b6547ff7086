from __future__ import annotations

import math

import pytest

from autopeft.core.codec import decode, encode
from autopeft.errors import UsageError
from autopeft.training.settings import LearningRates, TrainSettings


def test_scaling_leaves_the_head_alone() -> None:
    rates = LearningRates(head=1.0, matrix=2.0, core=3.0, entries=4.0, vector=5.0, adapter=6.0, tokens=7.0, dense=8.0)
    assert rates.scaled(0.5) == LearningRates(
        head=1.0, matrix=1.0, core=1.5, entries=2.0, vector=2.5, adapter=3.0, tokens=3.5, dense=4.0
    )
    assert TrainSettings(lr=rates, lr_scale=2.0).rates.core == 6.0
    assert TrainSettings(lr=rates, lr_scale=2.0).rates.head == 1.0


def test_rate_of_a_family() -> None:
    assert LearningRates(vector=0.25).of("vector") == 0.25
    assert LearningRates(head=0.5).of("head") == 0.5
    with pytest.raises(UsageError, match="family 'scaled'"):
        LearningRates().of("scaled")


def test_round_trip_through_json() -> None:
    settings = TrainSettings(
        epochs=3, lr=LearningRates(core=0.5), betas=(0.8, 0.9), amp="bf16", threads=2, rate_rule="spectral"
    )
    assert decode(TrainSettings, encode(settings)) == settings


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"epochs": 0}, "train.epochs"),
        ({"epochs": True}, "train.epochs"),
        ({"lr_scale": 0.0}, "train.lr_scale"),
        ({"lr_scale": math.inf}, "train.lr_scale"),
        ({"weight_decay": -1e-9}, "train.weight_decay"),
        ({"rate_rule": "mup"}, "train.rate_rule must be one of none, width, spectral, count"),
        ({"head_rule": "count"}, "train.head_rule"),
        ({"decay_rule": "sqrt"}, "train.decay_rule"),
        ({"lora_plus": 0.0}, "train.lora_plus"),
        ({"warmup_fraction": 1.01}, "train.warmup_fraction"),
        ({"clip": math.nan}, "train.clip"),
        ({"betas": (0.9, 1.0)}, r"train.betas\[1\]"),
        ({"betas": (0.9,)}, "train.betas"),
        ({"eps": 0.0}, "train.eps"),
        ({"amp": "fp16"}, "train.amp"),
        ({"threads": 0}, "train.threads"),
        ({"lr": 1e-3}, "train.lr"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        TrainSettings(**kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf, True, "1e-3"])
def test_a_rate_is_a_finite_number_above_0(value: object) -> None:
    with pytest.raises(UsageError, match=r"lr\.core"):
        LearningRates(core=value)  # type: ignore[arg-type]
