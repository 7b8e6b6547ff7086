from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopeft.core.site import Catalog, Site
from autopeft.models.scan import scan
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.grasp import GraSP
from autopeft.testing.tiny import tiny_vit

FILE = Gradient(batch_size=4, order="file")


def test_hand_worked(plain_task: type) -> None:
    """`(w x)^2 / 2` with x = (1, 2) always and w = (3, -1): w x = 1, g = (1, 2), H = [[1, 2], [2, 4]], H g = (5, 10).

    w H g = (15, -10).
    """
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -1.0]]))
    images = torch.tensor([[1.0, 2.0]], dtype=torch.float64).repeat(4, 1)
    task = plain_task(images, torch.zeros(4), lambda out, y: out[:, 0].square() / 2)
    catalog = Catalog((Site("0", "0", "linear", (1, 2), False, 0, "other", ("weight",)),), (), 2, 0, 1)
    found = GraSP(Gradient(batch_size=2)).score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(found.score, torch.tensor([[15.0, 10.0]], dtype=torch.float64))
    torch.testing.assert_close(found.signal, found.score.sqrt())
    kept = GraSP(Gradient(batch_size=2), absolute=False).score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(kept.score, torch.tensor([[15.0, 0.0]], dtype=torch.float64))


def test_finite_differences_of_the_gradient(noise_task: Callable[..., Any], gradients_of: Callable[..., Any]) -> None:
    """H g is the derivative of the gradient along g, in float64, through attention and norms."""
    model, task = tiny_vit().double(), noise_task(8)
    catalog = scan(model)
    scores = GraSP(FILE).score(model, catalog, task)
    batch = next(iter(task.batches("inner", batch_size=8)))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = gradients_of(model, task, batch)
    scored = {f"{n}.{slot}" for n, e in scores.evidence.items() if not e.site.rows for slot in ("weight", "bias")}
    scored |= {"cls_token", "pos_embed"}
    step = 1e-4

    def at(sign: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + (sign * step * gradient[name] if name in scored else 0))
        return gradients_of(model, task, batch)

    ahead, behind = at(1), at(-1)
    for name in (
        "blocks.0.attn.qkv.weight",
        "blocks.1.mlp.fc2.weight",
        "blocks.0.norm1.bias",
        "patch_embed.proj.weight",
    ):
        product = (ahead[name] - behind[name]) / (2 * step)
        site, slot = name.rsplit(".", 1)
        expected = (start[name] * product).abs()
        torch.testing.assert_close(
            scores.evidence[site][slot].score, expected, rtol=1e-4, atol=1e-5 * float(expected.max())
        )


@pytest.mark.parametrize("absolute", [True, False])
def test_a_loss_without_curvature_scores_nothing(line: Any, absolute: bool) -> None:
    """A linear loss has no second derivative, and not even a graph for one."""
    assert not GraSP(FILE, absolute).score(*line).evidence["0"]["weight"].score.any()
