from __future__ import annotations

from typing import Any

import torch

from autopeft.core.site import Catalog, Site
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.nvit import NViT


def test_hand_worked(line: Any) -> None:
    """Batches' gradients (2,0) and (0,2): mean squares (2,2), F = 2 * (2,2) = (4,4). Weights (2,-3): scores 16, 36."""
    model, catalog, task = line
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
    found = NViT(Gradient(batch_size=2, order="file")).score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(found.score, torch.tensor([[16.0, 36.0]], dtype=torch.float64))
    torch.testing.assert_close(found.signal, torch.tensor([[4.0, 6.0]], dtype=torch.float64))
    assert found.square is not None
    assert found.square.tolist() == [[2, 2]]


def test_hand_worked_per_sample(line: Any) -> None:
    """Gradients (1,0),(3,0),(-1,2),(1,2): F = (12/4, 8/4) = (3,2), with nothing to multiply by."""
    model, catalog, task = line
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
    scorer = NViT(Gradient(mode="per_sample", batch_size=2, order="file"))
    found = scorer.score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(found.score, torch.tensor([[12.0, 18.0]], dtype=torch.float64))


def test_the_loss_of_a_regression_changes_by_half_of_it(plain_task: type) -> None:
    """At the optimum of `(w x)^2 / 2` per sample with unit Gaussian residuals H = E[x^2]; the score is `w^2 F`.

    With residuals of exactly +-1, g = +-x, so F = E[x^2] = H and removing w costs `w^2 H / 2`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, generator=generator, dtype=torch.float64).repeat(2, 1)
    residual = torch.cat((torch.ones(8), -torch.ones(8))).double()
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)).double()
    weight = float(model[0].weight.detach())
    task = plain_task(x, weight * x[:, 0] + residual, lambda out, y: (out[:, 0] - y).square() / 2)
    catalog = Catalog((Site("0", "0", "linear", (1, 1), False, 0, "other", ("weight",)),), (), 1, 0, 1)
    score = NViT(Gradient(batch_size=1)).score(model, catalog, task).evidence["0"]["weight"].score
    batch = next(iter(task.batches("inner", batch_size=16)))
    before = task.loss(model, batch).item()
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(score.item() / 2, task.loss(model, batch).item() - before)
