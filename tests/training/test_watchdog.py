from __future__ import annotations

import pytest
import torch

from autopeft.errors import Diverged
from autopeft.training.watchdog import Watchdog


def _describe(step: int, what: str, value: float) -> str:
    return f"{what} {value} at {step}"


def test_sum_of_losses() -> None:
    watchdog = Watchdog(4, _describe, loss_sum=10.0)
    for step in range(6):
        watchdog.note(step, torch.tensor(float(step)), torch.tensor(1.0))
    assert watchdog.look() == 10.0 + 15.0
    assert watchdog.look() == 25.0


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (float("nan"), 1.0, "loss nan at 2"),
        (float("inf"), 1.0, "loss inf at 2"),
        (1.0, float("nan"), "norm .* nan at 2"),
    ],
)
def test_the_first_bad_step_is_named_however_late_it_is_read(loss: float, norm: float, message: str) -> None:
    watchdog = Watchdog(16, _describe)
    for step in range(5):
        bad = step == 2
        watchdog.note(step, torch.tensor(loss if bad else 1.0), torch.tensor(norm if bad else 1.0))
    with pytest.raises(Diverged, match=message):
        watchdog.look()
