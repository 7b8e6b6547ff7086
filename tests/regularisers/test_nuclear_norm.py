from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods.bias import Bias
from autopeft.methods.lora import LoRA
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF
from autopeft.regularisers.nuclear_norm import NuclearNorm, _Nuclear
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Step

FC1, PROJ = "blocks.0.mlp.fc1", "blocks.0.attn.proj"


def test_hand_worked(insert, step_of) -> None:
    # proj is 16 x 16; entries 0 and 17 are the first two of its diagonal.
    inserted = insert(tiny_vit(), (PROJ, "sparse", Sparse(), 2), entries=[0, 17])
    (adapter,) = inserted.named_adapters().values()
    with torch.no_grad():
        adapter.values.copy_(torch.tensor([3.0, -4.0]))
    term = NuclearNorm(0.5).begin(inserted, ToyTask(), 0).add(step_of(inserted))
    assert term.item() == pytest.approx(0.5 * (3 + 4))
    term.backward()
    assert adapter.values.grad.tolist() == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize(("model", "sites"), [("vit", (FC1, PROJ)), ("convnet", ("blocks.0.conv1", "blocks.1.conv2"))])
def test_value_and_gradient_of_low_rank_changes(insert, model: str, sites: tuple[str, str]) -> None:
    net = (tiny_vit() if model == "vit" else tiny_convnet()).double()
    inserted = insert(net, *((name, "lora", LoRA(alpha=3.0), 2) for name in sites))
    total = torch.zeros((), dtype=torch.float64)
    for adapter in inserted.named_adapters().values():
        nn.init.normal_(adapter.B)
        # Of full rank, where torch's own gradient of the norm is the only one: B counts by its triangle alone.
        triangle = torch.linalg.qr(1.5 * adapter.B).R
        total = total + torch.linalg.matrix_norm(triangle @ adapter.A, "nuc")
    parameters = [p for a in inserted.named_adapters().values() for p in a.parameters()]
    oracle = torch.autograd.grad(0.2 * total, parameters)
    term = NuclearNorm(0.2).begin(inserted, ToyTask(), 0).add(Step(inserted, ToyTask(), None, 0, 1))
    torch.testing.assert_close(term, 0.2 * total)
    for found, wanted in zip(torch.autograd.grad(term, parameters), oracle, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
def test_subgradient_of_dense_matrices(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    matrix[0, 1] = 0.0
    matrix.requires_grad_()
    _Nuclear.apply(matrix, None).backward()
    found, matrix.grad = matrix.grad, None
    torch.linalg.matrix_norm(matrix, "nuc").backward()
    torch.testing.assert_close(found, matrix.grad)


def test_rows_and_columns_of_zeros_are_left_alone() -> None:
    matrix = torch.zeros(6, 5, dtype=torch.float64)
    matrix[1, 2], matrix[1, 4], matrix[4, 2] = 1.0, -2.0, 0.5
    matrix.requires_grad_()
    value = _Nuclear.apply(matrix, None)
    value.backward()
    u, s, vh = torch.linalg.svd(matrix.detach()[[1, 4]][:, [2, 4]])
    wanted = torch.zeros(6, 5, dtype=torch.float64)
    wanted[torch.tensor([[1], [4]]), torch.tensor([2, 4])] = u @ vh
    torch.testing.assert_close(value.detach(), s.sum())
    torch.testing.assert_close(matrix.grad, wanted)


def test_the_subgradient_is_the_one_of_least_norm(insert, step_of) -> None:
    inserted = insert(tiny_vit(), (FC1, "lora", LoRA(), 2), (PROJ, "lora", LoRA(), 1))
    first, second = (inserted.named_adapters()[f"{name}/lora"] for name in (FC1, PROJ))
    with torch.no_grad():
        first.B[:, 0] = 1.0  # rank 1 of 2
    term = NuclearNorm(1.0).begin(inserted, ToyTask(), 0).add(step_of(inserted))
    term.backward()
    # U V^T of a change of rank one is a unit vector times a unit vector.
    a, b = first.A.detach()[0], torch.full((64,), 1.0)
    torch.testing.assert_close(term.detach(), a.norm() * 8)
    torch.testing.assert_close(first.A.grad[0], a / a.norm() * 8)
    torch.testing.assert_close(first.B.grad, torch.outer(b / 8, first.A.detach() @ (a / a.norm())))
    assert not second.B.grad.any()


def test_one_draws_every_weight_and_is_a_share_of_all(insert, step_of) -> None:
    sites = (FC1, PROJ, "blocks.1.mlp.fc2")
    inserted = insert(tiny_vit(), *((name, "lora", LoRA(), 1) for name in sites))
    norms = []
    for factor, adapter in enumerate(inserted.named_adapters().values(), 1):
        nn.init.constant_(adapter.B, factor)
        norms.append(torch.linalg.matrix_norm(adapter.delta()["weight"].detach(), "nuc").item())
    state = step_of(inserted)
    term = NuclearNorm(1.0, "one").begin(inserted, ToyTask(), seed=7)
    drawn = Counter()
    for step in range(300):
        state.step = step
        value = term.add(state).item()
        drawn[min(range(3), key=lambda i: abs(norms[i] - value))] += 1
        assert value == pytest.approx(min(norms, key=lambda n: abs(n - value)), rel=1e-5)
    assert all(70 < drawn[i] < 130 for i in range(3))
    state.step = 41
    assert term.add(state).item() == term.add(state).item()
    total = NuclearNorm(1.0).begin(inserted, ToyTask(), 7).add(state).item()
    assert total == pytest.approx(sum(norms), rel=1e-5)


def test_small_weights_and_other_changes_are_left_out(insert, step_of, caplog: pytest.LogCaptureFixture) -> None:
    inserted = insert(tiny_vit(), (FC1, "lora", LoRA(), 1), (FC1, "ssf", SSF(), 1), (PROJ, "bias", Bias(), 1))
    for adapter in inserted.named_adapters().values():
        for parameter in adapter.parameters():
            nn.init.ones_(parameter)
    state = step_of(inserted)
    lora = inserted.named_adapters()[f"{FC1}/lora"]
    norm = torch.linalg.matrix_norm(lora.delta()["weight"].detach(), "nuc").item()
    assert NuclearNorm(1.0, min_side=16).begin(inserted, ToyTask(), 0).add(state).item() == pytest.approx(norm)
    with caplog.at_level(logging.WARNING):
        assert NuclearNorm(1.0, min_side=17).begin(inserted, ToyTask(), 0).add(state) is None
    assert "nuclear_norm adds nothing" in caplog.text


def test_a_change_that_is_not_finite_gives_nan_and_no_crash() -> None:
    matrix = torch.full((3, 2), torch.inf, requires_grad=True)
    value = _Nuclear.apply(matrix, None)
    value.backward()
    assert value.isnan()
    assert matrix.grad.isnan().all()


def test_it_is_computed_in_full_precision_under_autocast(insert, step_of) -> None:
    inserted = insert(tiny_vit(), (FC1, "lora", LoRA(), 3))
    nn.init.normal_(inserted.named_adapters()[f"{FC1}/lora"].B)
    state = step_of(inserted)
    term = NuclearNorm(1.0).begin(inserted, ToyTask(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = term.add(state)
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, term.add(state))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight must be a number of at least 0"),
        ({"weight": float("nan")}, "weight must be"),
        ({"estimator": "some"}, "estimator must be one of all, one, got 'some'"),
        ({"min_side": 0}, "min_side must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NuclearNorm(**settings)
