from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods.lora import LoRA
from autopeft.regularisers._draw import generator_at
from autopeft.regularisers.gradient_dropout import GradientDropout, _keep
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask


@pytest.mark.parametrize(
    ("grad", "known", "keep"),
    [
        (1.0, 1.0, 1.0),
        (-2.0, -0.1, 1.0),
        (1.0, 0.0, 1.0),
        (1.0, -1.0, 0.5),
        (1.0, -3.0, 0.25),
        (0.0, 0.0, 0.5),
        (-2.0, 1.0, 2 / 3),
        (1e-20, -1e-20, 0.5),
    ],
)
def test_hand_worked_probabilities(grad: float, known: float, keep: float) -> None:
    assert _keep(torch.tensor(grad), torch.tensor(known)).item() == pytest.approx(keep)


def _logits(parameter: nn.Parameter) -> torch.Tensor:
    return torch.outer(torch.ones(3, dtype=torch.float64), parameter) * torch.arange(1.0, 4)[:, None].double()


def test_entries_are_dropped_or_scaled(scripted) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(400, dtype=torch.float64))
    teacher = torch.randn(3, 400, dtype=torch.float64)
    other = torch.autograd.grad(
        F.kl_div(F.log_softmax(_logits(parameter) / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean"), parameter
    )[0]
    grad = torch.randn(400, dtype=torch.float64) * other.abs().mean()
    state = scripted(_logits(parameter), teacher=teacher, parameters=[parameter], step=5)
    term = GradientDropout(0.75, temperature=2.0).begin(state.inserted, state.task, seed=9)
    assert term.add(state) is None
    assert parameter.grad is None
    parameter.grad = grad.clone()
    term.adjust(state)
    keep = 0.5 * (1 + grad.sign() * (grad + other) / (grad.abs() + other.abs()))
    draw = torch.rand(400, generator=generator_at(9, 5))
    torch.testing.assert_close(parameter.grad, torch.where(keep > draw, grad, 0.25 * grad))
    # Of 400 entries about as many are kept as their probabilities say.
    assert abs((parameter.grad == grad).sum().item() - keep.sum().item()) < 40
    assert 50 < (parameter.grad == grad).sum().item() < 350


def test_the_head_and_parameters_without_a_gradient_are_left_alone(insert, step_of) -> None:
    inserted = insert(tiny_vit(), ("blocks.0.mlp.fc1", "lora", LoRA(), 2))
    (adapter,) = inserted.named_adapters().values()
    nn.init.normal_(adapter.B)
    nn.init.normal_(inserted.model.head.weight)
    state = step_of(inserted)
    term = GradientDropout().begin(inserted, ToyTask(), 0)
    term.add(state)
    state.loss.backward()
    adapter.A.grad = None
    before = {name: p.grad.clone() for name, p in inserted.model.named_parameters() if p.grad is not None}
    term.adjust(state)
    after = {name: p.grad for name, p in inserted.model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 1
    assert changed[0].endswith(".B")
    mine = changed[0]
    kept = after[mine] != 0
    assert torch.equal(after[mine][kept], before[mine][kept])
    assert not kept.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, "weight must be at most 1"),
        ({"weight": -0.5}, "weight must be"),
        ({"temperature": -1.0}, "temp"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GradientDropout(**settings)
