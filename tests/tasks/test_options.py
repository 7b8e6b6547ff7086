from __future__ import annotations

import pytest

from autopeft.errors import UnknownKey, UsageError
from autopeft.tasks._options import DataOptions


def test_none_is_the_same_as_not_asking() -> None:
    assert DataOptions.of({"val_frac": None, "batch_size": None, "max_inner": None}) == DataOptions()


def test_options_are_taken_over() -> None:
    found = DataOptions.of({"batch_size": 8, "val_frac": 0.1, "max_samples": 50, "download": True, "unseal_token": "a"})
    assert found == DataOptions(8, 0.1, max_samples=50, download=True, unseal_token="a")


def test_an_unknown_option_is_guessed() -> None:
    with pytest.raises(UnknownKey, match=r"'batchsize'. Did you mean 'batch_size'\?"):
        DataOptions.of({"batchsize": 8})


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": True},
        {"batch_size": 2.5},
        {"batch_size": "8"},
        {"val_frac": "0.1"},
        {"val_frac": True},
        {"download": 1},
        {"workers": -1},
        {"unseal_token": 5},
    ],
)
def test_values_of_wrong_type_or_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        DataOptions.of(options)


def test_threads() -> None:
    assert DataOptions(workers=3).threads == 3
    assert 1 <= DataOptions().threads <= 8
