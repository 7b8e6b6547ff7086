from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from autopeft.errors import UsageError
from autopeft.regularisers.consistency import Consistency
from autopeft.training._terms import Step


def _term(state: Step, regulariser: Consistency) -> torch.Tensor:
    return regulariser.begin(state.inserted, state.task, 0).add(state)


def test_hand_worked(scripted) -> None:
    # One pass is undecided, the other three to one: the two divergences add up to (3/4 - 1/4) / 2 * log 3.
    state = scripted(torch.zeros(1, 2), again=torch.tensor([[0.0, math.log(3.0)]]))
    assert _term(state, Consistency(2.0)).item() == pytest.approx(2 * 0.5 * 0.25 * math.log(3))


def test_value_and_gradient(scripted) -> None:
    first = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    second = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    term = _term(scripted(first, again=second), Consistency(0.4))
    p, q = F.log_softmax(first, 1), F.log_softmax(second, 1)
    both = F.kl_div(q, p, reduction="batchmean", log_target=True) + F.kl_div(
        p, q, reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(term, 0.2 * both)
    term.backward()
    # Targets are constants: each pass is pulled to the other by the difference of their probabilities.
    difference = 0.2 * (p.exp() - q.exp()).detach() / 6
    torch.testing.assert_close(first.grad, difference)
    torch.testing.assert_close(second.grad, -difference)


def test_the_second_loss(scripted) -> None:
    same = torch.tensor([[1.0, 2.0, 6.0]])
    assert _term(scripted(same, again=same), Consistency(1.0)).item() == 0
    assert _term(scripted(same, again=same), Consistency(1.0, second=0.5)).item() == pytest.approx(0.5 * 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight": -1.0}, "weight must be"), ({"second": float("inf")}, "second must be"), ({"second": -1.0}, "second")],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Consistency(**settings)
