from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.core.budget import Budget, Cost
from autopeft.errors import UsageError


@pytest.mark.parametrize(
    ("text", "n_base", "limit"),
    [
        ("0.1%", 85_798_656, 85_798),  # ViT-B/16 without its classifier
        ("0.1%", 22_056_576, 22_056),  # ViT-S/14
        ("0.1%", 3_371_024, 3_371),  # EfficientNet-Lite0
        (" 0.1 % ", 85_798_656, 85_798),
        (".5%", 1000, 5),
        ("100%", 7, 7),
    ],
)
def test_a_share_is_of_the_base_parameters_and_rounds_down(text: str, n_base: int, limit: int) -> None:
    assert Budget.parse(text, n_base) == Budget(limit, "trainable", n_base, text.strip())


@pytest.mark.parametrize(
    ("text", "limit", "unit"),
    [
        ("1198", 1198, "trainable"),
        ("86k", 86_000, "trainable"),
        ("86K", 86_000, "trainable"),
        ("1.2M", 1_200_000, "trainable"),
        ("0.29k", 290, "trainable"),
        ("500KB", 500_000, "bytes"),
        ("1.5mb", 1_500_000, "bytes"),
        ("12B", 12, "bytes"),
        ("2000entries", 2000, "entries"),
        ("2000 entries", 2000, "entries"),
        ("500stored", 500, "stored"),
        ("1.2 stored", 1, "stored"),
    ],
)
def test_absolute_budgets(text: str, limit: int, unit: str) -> None:
    budget = Budget.parse(text, 10)
    assert (budget.limit, budget.unit, budget.share_of) == (limit, unit, None)


def test_decimal_shares_are_exact_where_floating_point_is_not() -> None:
    assert int(0.29 * 100) == 28, "the trap that fractions avoid"
    assert Budget.parse("29%", 100).limit == 29
    assert Budget.share(0.29, 100).limit == 29


@pytest.mark.parametrize("text", ["0", "0%", "0.0k", "0.4", "0.0001k", "0.5b", "0.001%"])
def test_a_budget_below_one_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"buys nothing|less than 1"):
        Budget.parse(text, 1000)


@pytest.mark.parametrize("text", ["", "-5", "5 % %", "1e3", "k", "lots", "1,000", "nan", "0x10", "1.2.3k"])
def test_what_is_no_budget_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read the budget .*write it as 0\.1%"):
        Budget.parse(text, 1000)


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(UsageError, match="unit 'GiB'"):
        Budget.parse("1 GiB", 1000)


@pytest.mark.parametrize("limit", [-1, True, 1.0, None, "5"])
def test_a_limit_is_a_whole_number(limit: Any) -> None:
    with pytest.raises(UsageError, match="whole number"):
        Budget(limit)


def test_the_unit_is_checked() -> None:
    with pytest.raises(UsageError, match="counted in trainable, entries, stored, bytes"):
        Budget(5, "bits")  # type: ignore[arg-type]


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(UsageError, match="negative"):
        Budget.share(-0.1, 100)


def test_what_a_person_reads() -> None:
    assert str(Budget.parse("0.1%", 85_798_656)) == "85,798 trainable parameters (0.1%)"
    assert str(Budget.share(Fraction(1, 1000), 85_798_656)) == "85,798 trainable parameters (0.1%)"
    assert str(Budget.parse("500KB", 1)) == "500,000 bytes"
    assert str(Budget.parse("20entries", 1)) == "20 changed entries"
    assert str(Budget.parse("2000stored", 1)) == "2,000 stored numbers"


@given(st.integers(1, 10**12), st.integers(1, 10**6))
def test_a_share_never_exceeds_its_fraction_and_misses_it_by_less_than_one(n_base: int, millionths: int) -> None:
    fraction = Fraction(millionths, 10**6)
    limit = Budget.share(str(fraction), n_base).limit
    assert limit <= fraction * n_base < limit + 1


def test_units_pick_their_component() -> None:
    cost = Cost(trainable=3, stored=5, bits=33, entries=12, tensors=2)
    assert cost.of("trainable") == 3
    assert cost.of("entries") == 12
    assert cost.of("stored") == 5
    assert cost.of("bytes") == 5 + 2 * 96  # 33 bits are 5 bytes, and two tensors have a header each


def test_costs_add_component_by_component() -> None:
    assert Cost(1, 2, 3, 4, 5) + Cost(10, 20, 30, 40, 50) == Cost(11, 22, 33, 44, 55)
    assert Cost(1, 2, 3, 4, 5) + Cost.zero() == Cost(1, 2, 3, 4, 5)


def test_a_plain_cost_stores_what_it_trains_as_float32() -> None:
    assert Cost.plain(7, 100, tensors=2) == Cost(trainable=7, stored=7, bits=224, entries=100, tensors=2)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "1"])
@pytest.mark.parametrize("name", ["trainable", "stored", "bits", "entries", "tensors"])
def test_a_component_is_a_whole_number(name: str, bad: Any) -> None:
    values: dict[str, Any] = {"trainable": 1, "stored": 1, "bits": 1, "entries": 1, "tensors": 1, name: bad}
    with pytest.raises(ValueError, match=f"{name} of a cost"):
        Cost(**values)
