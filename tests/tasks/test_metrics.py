from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.tasks.metrics import (
    classification_metrics,
    expected_calibration_error,
    macro_f1,
    mean_nll,
    scaled_nll,
    top1,
)


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 6))
def test_top1_f1_and_nll_equal_sklearn(seed: int, n: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator)
    predicted = logits.argmax(1).numpy()
    assert top1(logits, labels) == pytest.approx(accuracy_score(labels.numpy(), predicted))
    assert macro_f1(logits, labels) == pytest.approx(f1_score(labels.numpy(), predicted, average="macro"))
    probabilities = logits.double().softmax(1).numpy()
    assert mean_nll(logits, labels) == pytest.approx(log_loss(labels.numpy(), probabilities, labels=range(classes)))


def test_calibration_error_of_four_samples_by_hand() -> None:
    # Confidences .95, .94 (bin 15), .70 (bin 11) and .60 (bin 9, whose upper edge it is), hits 1, 0, 1, 1:
    # bin 15: |1 - 1.89| = .89; bin 11: |1 - .7| = .3; bin 9: |1 - .6| = .4; (.89 + .3 + .4) / 4 = .3975.
    logits = logits_of([[0.95, 0.05], [0.94, 0.06], [0.30, 0.70], [0.40, 0.60]])
    labels = torch.tensor([0, 1, 1, 1])
    assert expected_calibration_error(logits, labels) == pytest.approx(0.3975)


def test_calibration_error_sums_inside_a_bin_before_taking_the_absolute() -> None:
    # One bin, .95 right and .95 wrong: |(1 - .95) + (0 - .95)| / 2 = .45; with a bin each it would be .5.
    logits = logits_of([[0.95, 0.05], [0.95, 0.05]])
    assert expected_calibration_error(logits, torch.tensor([0, 1])) == pytest.approx(0.45)
    assert expected_calibration_error(logits, torch.tensor([0, 0])) == pytest.approx(0.05)


def test_bins_are_closed_above() -> None:
    # .75 is the upper edge of bin 3 of 4, where .60 is too: |(1 - .75) + (0 - .60)| / 2 = .175. Were it in bin 4:
    # (|1 - .75| + |0 - .60|) / 2 = .425. Both numbers are exact in binary or far from an edge.
    logits = logits_of([[0.75, 0.25], [0.60, 0.40]])
    assert expected_calibration_error(logits, torch.tensor([0, 1]), bins=4) == pytest.approx(0.175)


def test_certain_predictions_are_in_the_last_bin() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]])
    assert expected_calibration_error(logits, torch.tensor([0, 0])) == 0.0
    assert expected_calibration_error(logits, torch.tensor([1, 1])) == 1.0


def test_nll_of_equal_logits_is_the_logarithm_of_the_classes() -> None:
    assert mean_nll(torch.zeros(5, 7), torch.arange(5)) == pytest.approx(math.log(7))


def test_scaled_nll_of_a_margin_that_is_right_three_times_in_four() -> None:
    # At the best temperature the softmax says 3/4, and the loss is the entropy of that, however large the margin was.
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    for margin in (0.01, 1.0, 50.0):
        logits = torch.tensor([[margin, 0.0]] * 4)
        assert scaled_nll(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 6), st.floats(0.05, 20.0))
def test_scaled_nll_asks_what_is_known_and_not_how_surely(seed: int, n: int, classes: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (n,), generator=generator)
    found = scaled_nll(logits, labels)
    # The temperature lies between 1e-4 and 1e3, so that chance is reached to about a thousandth.
    assert found <= min(mean_nll(logits, labels), math.log(classes) + 5e-3) + 1e-9
    assert scaled_nll(factor * logits, labels) == pytest.approx(found, abs=5e-3)


def test_all_metrics_together() -> None:
    logits, labels = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    assert classification_metrics(logits, labels) == {
        "top1": top1(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "ece": expected_calibration_error(logits, labels),
        "nll": mean_nll(logits, labels),
        "scaled_nll": scaled_nll(logits, labels),
    }


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(2, 2), torch.tensor([0, 2])),
        (torch.zeros(2, 2), torch.tensor([-1, 0])),
    ],
)
@pytest.mark.parametrize("metric", [top1, macro_f1, expected_calibration_error, mean_nll, scaled_nll])
def test_bad_shapes_and_labels_are_refused(metric: object, logits: Tensor, labels: Tensor) -> None:
    with pytest.raises(UsageError):
        metric(logits, labels)  # type: ignore[operator]


def test_a_calibration_error_needs_bins() -> None:
    with pytest.raises(UsageError, match="at least 1 bin"):
        expected_calibration_error(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), bins=0)
