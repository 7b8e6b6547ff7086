from __future__ import annotations

import pytest
import torch

from autopeft.errors import UsageError
from autopeft.training.threads import choose_threads, cores, thread_count


@pytest.mark.parametrize(
    ("parameters", "load", "available", "expected"),
    [
        (4_999_999, 0.0, 16, 1),  # small model
        (5_000_000, 0.0, 16, 16),
        (86_000_000, 0.0, 1, 1),
        (86_000_000, 1.2, 2, 1),  # loaded machine
        (86_000_000, 4.0, 16, 12),  # the free cores of a busy one
        (86_000_000, 8.1, 16, 1),
    ],
)
def test_threads(parameters: int, load: float, available: int, expected: int) -> None:
    assert choose_threads(parameters, load=load, available=available) == expected


def test_measured_values_are_sane() -> None:
    assert 1 <= choose_threads(10**9) <= cores()


def _fail_with(expected: int) -> None:
    assert torch.get_num_threads() == expected
    raise ZeroDivisionError


def test_count_is_set_and_put_back_also_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), thread_count(before + 1):
        _fail_with(before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("n", [0, -1, 1.0, True])
def test_a_count_below_1_is_refused(n: object) -> None:
    with pytest.raises(UsageError, match="number of threads"), thread_count(n):  # type: ignore[arg-type]
        pass
