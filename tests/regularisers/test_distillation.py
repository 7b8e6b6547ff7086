from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods.block_adapter import BlockAdapter
from autopeft.methods.lora import LoRA
from autopeft.regularisers.distillation import Distillation
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Step

FC1 = "blocks.0.mlp.fc1"


def _term(state: Step, regulariser: Distillation) -> torch.Tensor:
    return regulariser.begin(state.inserted, state.task, 0).add(state)


def test_hand_worked(scripted) -> None:
    # The teacher is three to one for the second class, the model undecided.
    state = scripted(torch.zeros(1, 2, requires_grad=True), teacher=torch.tensor([[0.0, math.log(3.0)]]))
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert _term(state, Distillation(2.0, temperature=1.0)).item() == pytest.approx(2 * wanted)


@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 3, 3)])
def test_value_and_gradient_at_a_temperature(scripted, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64)
    term = _term(scripted(logits, teacher=teacher), Distillation(0.5, temperature=3.0))
    given = F.log_softmax(logits / 3, 1).movedim(1, -1).flatten(0, -2)
    target = F.softmax(teacher / 3, 1).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(term, 0.5 * 9 * F.kl_div(given, target, reduction="batchmean"))
    term.backward()
    places = logits.numel() / shape[1]
    closed = 0.5 * 3 * (F.softmax(logits.detach() / 3, 1) - F.softmax(teacher / 3, 1)) / places
    torch.testing.assert_close(logits.grad, closed)


def test_the_teacher_is_the_model_before_training(insert, step_of) -> None:
    inserted = insert(tiny_vit(), (FC1, "lora", LoRA(), 2))
    regulariser = Distillation(1.0)
    batch = next(iter(ToyTask().batches("inner", 1)))
    with torch.no_grad():
        start = inserted.model(batch[0])
    assert _term(step_of(inserted), regulariser).item() == pytest.approx(0, abs=1e-6)
    for group in inserted.groups().values():
        for parameter in group:
            nn.init.normal_(parameter)
    state = step_of(inserted)
    oracle = 4 * F.kl_div(F.log_softmax(state.logits / 2, 1), F.softmax(start / 2, 1), reduction="batchmean")
    torch.testing.assert_close(_term(state, regulariser), oracle)


def test_the_teacher_runs_in_evaluation_mode_and_moves_no_statistics(insert) -> None:
    net = tiny_convnet()
    inserted = insert(net, ("blocks.1", "block_adapter", BlockAdapter(), 2), train_batch_norm=True)
    task, before = ToyTask(), net.norm.running_mean.clone()
    batch = next(iter(task.batches("inner", 1)))
    inserted.train_mode()
    assert net.norm.training
    state = Step(inserted, task, batch, 0, 1, {"logits": torch.zeros(8, 4), "loss": torch.zeros(())})
    _term(state, Distillation())
    assert net.norm.training
    assert torch.equal(net.norm.running_mean, before)
    inserted.model(batch[0])
    assert not torch.equal(net.norm.running_mean, before)


def test_a_model_that_returns_no_tensor_is_refused(scripted) -> None:
    state = scripted(torch.zeros(1, 2), teacher=torch.zeros(1, 2))
    state.task.loss = lambda model, batch: torch.zeros(())
    with pytest.raises(UsageError, match="needs the logits of a batch as one tensor"):
        _term(state, Distillation())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight": -1.0}, "weight must be"), ({"temperature": 0.0}, "temperature must be a positive number, got 0.0")],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Distillation(**settings)
