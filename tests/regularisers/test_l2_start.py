from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods.bias import Bias
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.ssf import SSF
from autopeft.regularisers.l2_start import L2Start
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Step

FC1, PROJ = "blocks.0.mlp.fc1", "blocks.0.attn.proj"


def _term(inserted, regulariser: L2Start) -> torch.Tensor:
    return regulariser.begin(inserted, ToyTask(), 0).add(Step(inserted, ToyTask(), None, 0, 1))


def test_hand_worked(insert) -> None:
    inserted = insert(tiny_vit(), (PROJ, "bias", Bias(), 1))
    (adapter,) = inserted.named_adapters().values()
    (shift,) = adapter.parameters()
    with torch.no_grad():
        shift[0], shift[3] = 3.0, -4.0
    term = _term(inserted, L2Start(0.5))
    assert term.item() == 0.25 * (9 + 16)
    term.backward()
    assert shift.grad[[0, 1, 3]].tolist() == [1.5, 0.0, -2.0]
    shift.grad = None
    term = _term(inserted, L2Start(0.5, "sign"))
    assert term.item() == 0.5 * (3 + 4)
    term.backward()
    assert shift.grad[[0, 1, 3]].tolist() == [0.5, 0.0, -0.5]


def test_it_is_the_distance_of_the_merged_model_from_the_plain_one(insert) -> None:
    net = tiny_vit()
    start = {name: tensor.double().clone() for name, tensor in net.state_dict().items()}
    inserted = insert(
        net, (FC1, "lora", LoRA(alpha=3.0), 2), (FC1, "bias", Bias(), 1), ("blocks.1.norm1", "norm", Norm(), 1)
    )
    for adapter in inserted.named_adapters().values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    merged = inserted.merged_state()
    distance = sum((merged[n].double() - t).square().sum().item() for n, t in start.items())
    assert _term(inserted, L2Start(2.0)).item() == pytest.approx(distance, rel=1e-5)
    magnitudes = sum((merged[n].double() - t).abs().sum().item() for n, t in start.items())
    assert _term(inserted, L2Start(2.0, "sign")).item() == pytest.approx(2 * magnitudes, rel=1e-5)


def test_changes_that_are_not_additive_are_left_alone(insert, caplog: pytest.LogCaptureFixture) -> None:
    inserted = insert(tiny_vit(), (FC1, "ssf", SSF(), 1))
    with caplog.at_level(logging.WARNING):
        assert _term(inserted, L2Start()) is None
    assert "no option of the plan has an additive change" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight": float("inf")}, "weight must be"), ({"pull": "cube"}, "pull must be one of square, sign, got 'cube'")],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        L2Start(**settings)
