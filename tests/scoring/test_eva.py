from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopeft.core.site import Catalog, Site
from autopeft.methods.lora import LoRA
from autopeft.models.scan import scan
from autopeft.scoring.eva import EVA
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask


def linear(shape: tuple[int, int]) -> Catalog:
    return Catalog((Site("0", "0", "linear", shape, False, 0, "other", ("weight",)),), (), 9, 0, 1)


def test_hand_worked(plain_task: type) -> None:
    """Inputs (+-2, 5) and (0, 5 +- 1): means are no variance; what is left is 4/2 and 1/2, shares 0.8 and 0.2."""
    images = torch.tensor([[2.0, 5.0], [-2.0, 5.0], [0.0, 6.0], [0.0, 4.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    catalog = linear((3, 2))
    scores = EVA(Gradient(batch_size=2)).score(model, catalog, plain_task(images, torch.zeros(4, dtype=torch.long)))
    signal = scores.evidence["0"]["weight"].signal
    torch.testing.assert_close(signal.T @ signal, torch.diag(torch.tensor([0.8, 0.2], dtype=torch.float64)))
    # The leading direction is shared by all rows alike.
    torch.testing.assert_close(signal[:, 0].abs(), torch.full((3,), (0.8 / 3) ** 0.5, dtype=torch.float64))
    assert LoRA().gains(catalog["0"], scores.evidence["0"], (1, 2)) == pytest.approx((0.8, 1.0))


def test_a_matrix_of_few_rows_keeps_the_leading_directions(plain_task: type) -> None:
    images = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    scores = EVA().score(model, linear((1, 2)), plain_task(images, torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(
        scores.evidence["0"]["weight"].score, torch.tensor([[0.8, 0.0]], dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_inputs_of_layers_in_a_model() -> None:
    """Against the spectrum of inputs caught by hand: of a linear layer over its tokens, of a convolution's patches."""
    for model, name in ((tiny_vit(), "blocks.1.mlp.fc2"), (tiny_convnet(), "blocks.0.conv1")):
        model.double()
        task = ToyTask()
        task._images = {split: images.double() for split, images in task._images.items()}
        caught: list[Any] = []
        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda m, x, caught=caught: caught.append(x[0].detach()))
        with torch.no_grad():
            for images, _ in task.batches("inner"):
                model(images)
        handle.remove()
        x = torch.cat(caught)
        if isinstance(module, nn.Conv2d):
            x = torch.cat([F.unfold(part, 3, padding=1).mT for part in x.chunk(4, 1)])
        x = x.flatten(0, -2)
        variances = torch.linalg.svdvals(x - x.mean(0)).square()
        signal = EVA().score(model, scan(model), task).evidence[name]["weight"].signal.flatten(1)
        n = min(signal.shape)
        expected = variances[:n] / variances.sum()
        torch.testing.assert_close(torch.linalg.svdvals(signal).square(), expected, rtol=1e-6, atol=1e-9)


def test_vectors_and_constant_inputs_score_nothing(plain_task: type) -> None:
    images = torch.full((4, 2), 7.0, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    scores = EVA().score(model, linear((3, 2)), plain_task(images, torch.zeros(4, dtype=torch.long)))
    assert not scores.evidence["0"]["weight"].score.any()
    vit = tiny_vit()
    assert not EVA().score(vit, scan(vit), ToyTask()).evidence["norm"]["weight"].score.any()
