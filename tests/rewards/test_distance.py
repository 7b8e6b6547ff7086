from __future__ import annotations

import pytest
import torch

from autopeft.errors import UsageError
from autopeft.rewards import _distance
from autopeft.rewards._distance import nearest


def test_hand_worked() -> None:
    x = torch.tensor([[3.0, 4.0], [-1.0, 0.0]])
    y = torch.tensor([[0.0, 0.0], [6.0, 8.0], [1.0, 0.0]])
    found, rows = nearest(x, y)
    # |(3, 4)| = 5 = |(3, 4) - (6, 8)|: the first of them; (2, 4) to the last is the root of 20, which is less.
    assert found.tolist() == pytest.approx([20**0.5, 1.0])
    assert rows.tolist() == [2, 0]
    found, rows = nearest(x, y[1:], "cosine")
    assert found.tolist() == pytest.approx([0.0, 1.6])
    assert rows.tolist() == [0, 0]
    found, rows = nearest(x, y[1:], "abs_cosine")
    assert found.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert rows.tolist() == [0, 1]


@pytest.mark.parametrize("metric", ["l2", "cosine", "abs_cosine"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, metric: _distance.Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, 2, generator=generator) for n in (23, 17))
    whole = nearest(x, y, metric)
    monkeypatch.setattr(_distance, "_CELLS", 40)
    parts = nearest(x, y, metric)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)


def test_near_rows_are_told_from_equal_ones() -> None:
    # |x - y| = 1e-9 beside |x| = 1e3: the expansion into products would give 0 or noise.
    x = torch.full((1, 4), 1e3, dtype=torch.float64)
    y = x.clone()
    y[0, 0] += 1e-9
    assert nearest(x, y)[0].item() == pytest.approx(float((x - y).abs().max()), rel=1e-6)


def test_a_zero_row_is_far_from_everything_by_cosine() -> None:
    assert nearest(torch.zeros(1, 2), torch.ones(1, 2), "cosine")[0].item() == 1.0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2), torch.zeros(2, 2), "rows of numbers"),
        (torch.zeros(2, 3), torch.zeros(2, 2), "3 and of 2"),
        (torch.tensor([[float("nan")]]), torch.zeros(1, 1), "1 of 1 rows hold NaN"),
    ],
)
def test_bad_inputs_are_refused(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        nearest(x, y)
