from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopeft.errors import BudgetMismatch, UsageError
from autopeft.training.optim import make_optimizer, optimised_count, schedule_factor, set_rates
from autopeft.training.settings import LearningRates, TrainSettings


def test_groups_rates_and_decay(insert: Callable[..., Any], methods: dict[str, Any]) -> None:
    settings = TrainSettings(lr=LearningRates(head=0.1, matrix=0.2), lr_scale=3.0, weight_decay=0.5, rate_rule="none")
    inserted = insert()
    optimizer = make_optimizer(inserted, settings, methods)
    rows = [(g["key"], g["weight_decay"], round(g["lr"], 9), len(g["params"])) for g in optimizer.param_groups]
    assert rows == [("lora", 0.5, 0.6, 2), ("lora", 0.0, 0.6, 1), ("head", 0.5, 0.1, 1), ("head", 0.0, 0.1, 1)]
    assert optimised_count(optimizer) == inserted.allocation.trainable == 2 * (192 + 12) + 12
    set_rates(optimizer, 0.5)
    assert [round(g["lr"], 9) for g in optimizer.param_groups] == [0.3, 0.3, 0.05, 0.05]
    assert optimizer.defaults["betas"] == settings.betas


@pytest.mark.parametrize("price", [419, 421])
def test_a_price_that_is_not_the_optimizers_count_is_a_bug(
    insert: Callable[..., Any], methods: dict[str, Any], price: int
) -> None:
    with pytest.raises(BudgetMismatch, match=rf"420 trainable .* costs {price}; per method: lora 420, head 52"):
        make_optimizer(insert(price=price), TrainSettings(), methods)


def test_a_frozen_parameter_does_not_count(insert: Callable[..., Any], methods: dict[str, Any]) -> None:
    inserted = insert()
    inserted.adapter.bias.requires_grad_(False)
    with pytest.raises(BudgetMismatch, match="408"):
        make_optimizer(inserted, TrainSettings(), methods)


def test_a_parameter_listed_twice_counts_once(insert: Callable[..., Any], methods: dict[str, Any]) -> None:
    optimizer = make_optimizer(insert(), TrainSettings(), methods)
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[0]["params"][0])
    assert optimised_count(optimizer) == 420


def test_a_method_the_study_lacks(insert: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="'lora'"):
        make_optimizer(insert(), TrainSettings(), {})


def test_schedule_by_hand() -> None:
    # 20 steps, 10 % warm-up = 2 steps: 1/2, 1, then half a cosine over 18 steps.
    factors = [schedule_factor(s, 20, 0.1) for s in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[11] == pytest.approx(0.5)
    assert factors[8] == pytest.approx(0.75)  # a third of the way: (1 + cos 60 deg) / 2
    assert factors[19] == pytest.approx((1 + math.cos(math.pi * 17 / 18)) / 2)
    assert factors[1:] == sorted(factors[1:], reverse=True)


def test_schedule_equals_torchs_schedulers() -> None:
    total, warmup = 30, 6
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    for step in range(total):
        assert schedule_factor(step, total, 0.2) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        (up if step < warmup - 1 else down).step() if step != warmup - 1 else None


def test_schedule_ends() -> None:
    assert schedule_factor(0, 1, 0.1) == 1.0
    assert [schedule_factor(s, 4, 1.0) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(UsageError, match="step 4"):
        schedule_factor(4, 4, 0.0)
