from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods.core import Core
from autopeft.methods.dora import DoRA
from autopeft.methods.lora import LoRA
from autopeft.methods.pego import PEGO
from autopeft.regularisers.orthogonality import Orthogonality
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Step

FC1, QKV = "blocks.0.mlp.fc1", "blocks.0.attn.qkv"


def _term(inserted, regulariser: Orthogonality) -> torch.Tensor:
    return regulariser.begin(inserted, ToyTask(), 0).add(Step(inserted, ToyTask(), None, 0, 1))


def test_hand_worked(insert) -> None:
    inserted = insert(tiny_vit(), (FC1, "lora", LoRA(), 2))
    (adapter,) = inserted.named_adapters().values()
    with torch.no_grad():
        adapter.A.zero_()
        adapter.A[0, 0], adapter.A[1, 0], adapter.A[1, 1] = 1.0, 1.0, 1.0
        adapter.B[5, 0], adapter.B[5, 1] = 2.0, 1.0
    # A A^T - I = [[0, 1], [1, 1]] and B^T B - I = [[3, 2], [2, 0]].
    assert _term(inserted, Orthogonality(0.5)).item() == 0.5 * 3
    assert _term(inserted, Orthogonality(0.5, "both")).item() == 0.5 * (3 + 17)


def test_gradient_has_its_closed_form(insert) -> None:
    inserted = insert(tiny_vit().double(), (FC1, "lora", LoRA(), 4), (QKV, "dora", DoRA(), 2))
    term = _term(inserted, Orthogonality(0.3))
    term.backward()
    for adapter in inserted.named_adapters().values():
        a = adapter.A.detach()
        torch.testing.assert_close(adapter.A.grad, 0.3 * 4 * (a @ a.T - torch.eye(len(a), dtype=a.dtype)) @ a)
        assert adapter.B.grad is None


def test_orthonormal_rows_cost_nothing(insert) -> None:
    inserted = insert(tiny_vit().double(), (FC1, "lora", LoRA(), 4))
    (adapter,) = inserted.named_adapters().values()
    nn.init.orthogonal_(adapter.A)
    nn.init.orthogonal_(adapter.B)
    assert _term(inserted, Orthogonality(1.0, "both")).item() == pytest.approx(0, abs=1e-24)


def test_against_the_weight_it_is_pegos_own_penalty(insert) -> None:
    inserted = insert(tiny_vit(), (f"{QKV}[q]", "pego", PEGO(members=2, strength=0.25), 2))
    (adapter,) = inserted.named_adapters().values()
    nn.init.normal_(adapter.B)
    own = adapter.penalty()
    assert own.item() > 0
    torch.testing.assert_close(_term(inserted, Orthogonality(0.25, "weight")), own)


@pytest.mark.parametrize(("model", "site"), [(tiny_vit, QKV), (tiny_convnet, "blocks.0.conv1")])
def test_against_the_weight_by_brute_force(insert, model, site: str) -> None:
    net = model().double()
    inserted = insert(net, (site, "lora", LoRA(), 2))
    (adapter,) = inserted.named_adapters().values()
    nn.init.normal_(adapter.B)
    weight = net.get_submodule(site).weight.detach().flatten(1)
    oracle = 0.1 * (weight @ (adapter.B @ adapter.A).T).abs().sum()
    wanted = torch.autograd.grad(oracle, list(adapter.parameters()))
    term = _term(inserted, Orthogonality(0.1, "weight"))
    torch.testing.assert_close(term, oracle)
    for found, exact in zip(torch.autograd.grad(term, list(adapter.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, exact)


def test_options_without_factors_are_left_alone(insert, caplog: pytest.LogCaptureFixture) -> None:
    inserted = insert(tiny_vit(), (FC1, "core", Core(), 2))
    with caplog.at_level(logging.WARNING):
        assert _term(inserted, Orthogonality()) is None
    assert "no option of the plan has factors A and B" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight": -0.1}, "weight must be"), ({"form": "columns"}, "form must be one of rows, both, weight")],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Orthogonality(**settings)
