from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.core.site import Catalog, Place
from autopeft.errors import UsageError
from autopeft.models.scan import scan
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_vit

FILE = Gradient(batch_size=2, order="file", halves=True)
PARTS = Gradient(batch_size=4, order="file", halves=True, squares=True)


def test_hand_worked(line: tuple[nn.Module, Catalog, Any]) -> None:
    """Batches (1,0),(3,0) and (-1,2),(1,2): gradients (2,0) and (0,2), mean (1,1), mean square (2,2).

    F = 2 (samples per batch) * (2,2) = (4,4), mean 4. With damping 1/4: F + 1 = 5. Power 1: signal = 1 / sqrt(5).
    """
    model, catalog, task = line
    found = Fisher(FILE, power=1.0, damping=0.25).score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(found.signal, torch.full((1, 2), 5**-0.5, dtype=torch.float64))
    torch.testing.assert_close(found.score, torch.full((1, 2), 0.2, dtype=torch.float64))
    assert found.square is not None
    assert found.square.tolist() == [[2, 2]]
    assert found.half_a is not None
    torch.testing.assert_close(found.half_a, torch.tensor([[2 * 5**-0.5, 0.0]], dtype=torch.float64))
    half = Fisher(FILE, power=0.5, damping=0.25).score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(half.score, torch.full((1, 2), 5**-0.5, dtype=torch.float64))


def test_hand_worked_per_sample(line: tuple[nn.Module, Catalog, Any]) -> None:
    """Gradients (1,0),(3,0),(-1,2),(1,2): mean (1,1), F = (12/4, 8/4) = (3,2), mean 2.5."""
    model, catalog, task = line
    scorer = Fisher(Gradient(mode="per_sample", batch_size=2, order="file"), power=1.0, damping=0.2)
    found = scorer.score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(found.score, torch.tensor([[1 / 3.5, 1 / 2.5]], dtype=torch.float64))


def test_power_zero_is_the_gradient(noise_task: Callable[..., Any]) -> None:
    model, task = tiny_vit().double(), noise_task(8)
    catalog = scan(model)
    plain, fisher = PARTS.score(model, catalog, task), Fisher(PARTS, power=0.0).score(model, catalog, task)
    for name, evidence in plain.evidence.items():
        for slot, tensors in evidence.slots.items():
            assert torch.equal(fisher.evidence[name][slot].signal, tensors.signal)
            assert torch.equal(fisher.evidence[name][slot].score, tensors.signal.square())


def test_the_mean_is_that_of_the_whole_model(noise_task: Callable[..., Any]) -> None:
    """With damping that drowns F, the denominator is one number for all tensors, and another for block outputs."""
    model, task = tiny_vit().double(), noise_task(8)
    catalog = scan(model)
    plain = PARTS.score(model, catalog, task)
    drowned = Fisher(PARTS, power=1.0, damping=1e12).score(model, catalog, task)
    whole = [s for s in catalog if not s.parent and s.kind != "residual"]
    for kinds in (lambda s: s.kind != "block", lambda s: s.kind == "block"):
        slots = [(s.name, slot) for s in whole if kinds(s) for slot in plain.evidence[s.name].slots]
        squares = torch.cat([plain.evidence[n][slot].square.flatten() for n, slot in slots])  # type: ignore[union-attr]
        for n, slot in slots:
            expected = plain.evidence[n][slot].signal / (4e12 * squares.mean()).sqrt()
            torch.testing.assert_close(drowned.evidence[n][slot].signal, expected, rtol=1e-5, atol=0)


def test_scaling_the_loss(noise_task: Callable[..., Any]) -> None:
    """A loss times c: the score goes with c to the power of 2 - 2 power."""
    model, task = tiny_vit().double(), noise_task(8)
    catalog = scan(model)
    original = task.criterion
    one = {p: Fisher(PARTS, power=p).score(model, catalog, task) for p in (0.5, 1.0)}
    task.criterion = lambda out, y: 3 * original(out, y)
    place = Place("blocks.0.mlp.fc1", "weight")
    for power, factor in ((0.5, 3), (1.0, 1)):
        found = Fisher(PARTS, power=power).score(model, catalog, task).totals[place]
        assert found == pytest.approx(factor * one[power].totals[place])


def test_halves_average_to_the_signal(noise_task: Callable[..., Any]) -> None:
    model, task = tiny_vit().double(), noise_task(8)
    scores = Fisher(PARTS).score(model, scan(model), task)
    found = scores.evidence["blocks.0.attn.proj"]["weight"]
    assert found.half_a is not None
    assert found.half_c is not None
    torch.testing.assert_close((found.half_a + found.half_c) / 2, found.signal)
    assert not torch.allclose(found.half_a, found.signal)


def test_no_gradient_at_all(line: tuple[nn.Module, Catalog, Any]) -> None:
    model, catalog, task = line
    task.images.zero_()
    assert Fisher(FILE).score(model, catalog, task).totals == {Place("0", "weight"): 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 1.5}, r"fisher\.power must lie between 0"),
        ({"power": -0.1}, r"fisher\.power"),
        ({"damping": 0.0}, r"fisher\.damping must be positive"),
        ({"damping": float("inf")}, r"fisher\.damping"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Fisher(**settings)
