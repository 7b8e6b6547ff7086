from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopeft.core.site import Catalog, Site
from autopeft.models.scan import scan
from autopeft.scoring.activation import _Sketch, activation_bases
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask


def test_hand_worked(plain_task: type) -> None:
    """Inputs (3, 4) and (4, -3) read once and once more at half the size; one output row has all of the gradient."""
    images = torch.tensor([[3.0, 4.0], [2.0, -1.5]])
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    site = Site("0", "0", "linear", (2, 2), False, 0, "other", ("weight",))
    task = plain_task(images, torch.zeros(2, dtype=torch.long))
    found, samples = activation_bases(model, Catalog((site,), (), 4, 0, 1), task, Gradient(), 0, 1)
    left, right = found["0"]
    torch.testing.assert_close(right, torch.tensor([[0.6], [0.8]]))
    # Cross-entropy over two classes: dL/dy is (-p, p).
    torch.testing.assert_close(left.abs(), torch.full((2, 1), 0.5**0.5))
    assert samples == 2


@pytest.mark.parametrize(("make", "name"), [(tiny_vit, "blocks.1.mlp.fc2"), (tiny_convnet, "blocks.0.conv1")])
def test_against_moments_caught_by_hand(make: Any, name: str) -> None:
    model, task = make(), ToyTask()
    catalog = scan(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    found, _ = activation_bases(model, catalog, task, Gradient(batch_size=4), 0, 64)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    site, module = catalog[name], model.get_submodule(name)
    caught: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, given: Any, output: Tensor) -> None:
        output.retain_grad()
        caught.append((given[0].detach(), output))

    handle = module.register_forward_hook(keep)
    reads = torch.zeros(site.in_features, site.in_features, dtype=torch.float64)
    writes = torch.zeros(site.out_features, site.out_features, dtype=torch.float64)
    for images, labels in task.batches("inner", batch_size=4):
        F.cross_entropy(model(images), labels, reduction="sum").backward()
        x, y = caught.pop()
        if isinstance(module, nn.Conv2d):
            x = torch.cat([F.unfold(part, 3, padding=1).mT for part in x.chunk(site.groups, 1)])
        rows = x.reshape(-1, site.in_features).double()
        back = y.grad.movedim(site.channel_axis, -1).reshape(-1, site.out_features).double()
        reads += rows.T @ rows
        writes += back.T @ back
    handle.remove()
    for basis, moment in zip(found[name], (writes, reads), strict=True):
        n = basis.shape[1]
        torch.testing.assert_close(basis.T @ basis, torch.eye(n), atol=1e-4, rtol=0)
        values = torch.linalg.eigvalsh(moment).flip(0)
        captured = (basis.double().T @ moment @ basis.double()).diagonal()
        torch.testing.assert_close(captured, values[:n], rtol=1e-3, atol=1e-5 * float(values[0]))


def test_slices_have_bases_of_their_own_rows() -> None:
    model, task = tiny_vit(), ToyTask()
    catalog = scan(model)
    found, _ = activation_bases(model, catalog, task, Gradient(), 0, 2)
    whole = catalog["blocks.0.attn.qkv"]
    for part in whole.parts:
        assert found[part][0].shape == (whole.out_features // 3, 2)
        assert torch.equal(found[part][1], found[whole.name][1])


def test_a_sketch_finds_the_leading_directions_of_a_wide_matrix() -> None:
    """200 sides, 2 * 8 columns: directions of falling energy, found to a per mille of the energy they hold."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]
    rows = torch.randn(4000, 200, generator=generator) * 0.6 ** torch.arange(200) @ basis.T
    sketch = _Sketch(200, 8, generator)
    for part in rows.split(1000):
        sketch.add(part)
    found = sketch.leading(8).double()
    moment = rows.double().T @ rows.double()
    best = float(torch.linalg.eigvalsh(moment).flip(0)[:8].sum())
    assert float((found.T @ moment @ found).trace()) > 0.999 * best
    assert sketch.leading(3) is not None
    assert _Sketch(200, 8, generator).leading(3) is None
