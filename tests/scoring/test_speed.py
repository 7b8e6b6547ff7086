"""A scoring pass costs little more than the forward and backward passes it is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from autopeft.models.scan import scan
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask


def plain(model: nn.Module, task: ToyTask, batch_size: int) -> None:
    """What a training step does, without the optimiser."""
    for batch in task.batches("inner", 0, batch_size):
        model.zero_grad()
        task.loss(model, batch).backward()
    model.zero_grad()


def paired_ratios(model: nn.Module, task: ToyTask, batch_size: int, pairs: int) -> list[float]:
    """Processor time of a scoring pass over that of plain passes, one after the other, in turns of order."""
    catalog, scorer = scan(model), Gradient(batch_size=batch_size)

    def seconds(act: Callable[[], object]) -> float:
        start = time.process_time()
        act()
        return time.process_time() - start

    def score() -> None:
        scorer.score(model, catalog, task)

    def step() -> None:
        plain(model, task, batch_size)

    step()
    score()
    ratios = []
    for i in range(pairs):
        first, second = (score, step) if i % 2 else (step, score)
        one, two = seconds(first), seconds(second)
        ratios.append(one / two if i % 2 else two / one)
    return ratios


@pytest.mark.slow
def test_cost_of_a_pass_over_five_million_parameters() -> None:
    """At most 1.25 times the plain passes; measured in turns, so that other load falls on both alike."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=4).eval()
    task = ToyTask(n_inner=128, size=64)
    ratios = paired_ratios(model, task, 8, 9)
    print(f"ratios {', '.join(f'{r:.3f}' for r in sorted(ratios))}; median {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) <= 1.25


def test_cost_is_of_the_order_of_a_pass() -> None:
    """The same on a model so small that it is all overhead: a second pass, or work per sample, would be seen."""
    ratios = paired_ratios(tiny_vit(), ToyTask(n_inner=64), 8, 5)
    assert statistics.median(ratios) < 3
