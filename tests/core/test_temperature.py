from __future__ import annotations

import numpy as np
import pytest
import torch

from autopeft.core.temperature import temperature_of


def test_temperature() -> None:
    # Two classes, margin 1, right in 3 of 4 samples: the best softmax says 3/4, so the inverse temperature is log 3.
    logits = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    temperature, nll = temperature_of(logits, torch.tensor([0, 0, 0, 1]))
    assert temperature == pytest.approx(1 / np.log(3))
    assert nll == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert temperature_of(logits, torch.tensor([0, 0, 0, 0]))[0] == pytest.approx(1e-4, rel=1e-2)
    assert temperature_of(logits, torch.tensor([1, 1, 1, 1]))[0] == pytest.approx(1e3, rel=1e-2)


def test_smoothed_targets_keep_a_perfect_probe_finite() -> None:
    # Two classes, margin 1, always right, target 1 - e/2: the best softmax says 1 - e/2, so s = log((1 - e/2) / (e/2)).
    logits = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    e = 1 / 6
    temperature, nll = temperature_of(logits, torch.tensor([0, 0, 0, 0]), e)
    assert 1 / temperature == pytest.approx(np.log((1 - e / 2) / (e / 2)))
    assert nll == pytest.approx(-np.log(1 - e / 2))
