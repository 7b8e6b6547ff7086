from __future__ import annotations

from typing import Any

import pytest
import torch

from autopeft.errors import UsageError
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.sensitivity import Sensitivity


def test_hand_worked(line: Any) -> None:
    """Batches' gradients (2,0) and (0,2), weights (2,-3): sensitivities (4,0) then (0,6), with both betas 1/2.

    First entry: I = 2, U = |4 - 2| / 2 = 1; then I = 1, U = 1/2 + |0 - 1| / 2 = 1: score 1. Second entry: I = 0, U = 0;
    then I = 3, U = |6 - 3| / 2 = 3/2: score 9/2.
    """
    model, catalog, task = line
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
    scorer = Sensitivity(Gradient(batch_size=2, order="file"), beta1=0.5, beta2=0.5)
    found = scorer.score(model, catalog, task).evidence["0"]["weight"]
    torch.testing.assert_close(found.score, torch.tensor([[1.0, 4.5]], dtype=torch.float64))
    torch.testing.assert_close(found.signal, torch.tensor([[1.0, 4.5**0.5]], dtype=torch.float64))


def test_no_decay_is_the_last_batch_and_no_uncertainty(line: Any) -> None:
    model, catalog, task = line
    scorer = Sensitivity(Gradient(batch_size=2, order="file"), beta1=0.0, beta2=0.0)
    assert not scorer.score(model, catalog, task).evidence["0"]["weight"].score.any()


def test_one_process_and_whole_batches(line: Any) -> None:
    with pytest.raises(UsageError, match="whole batches in one process"):
        Sensitivity(Gradient(mode="per_sample", batch_size=2)).score(*line)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(UsageError, match=f"sensitivity.{name} must be at least 0 and below 1"):
        Sensitivity(**{name: 1.0})  # type: ignore[arg-type]
