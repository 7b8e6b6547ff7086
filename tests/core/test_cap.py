from __future__ import annotations

import pytest

from autopeft.core.budget import Cost
from autopeft.core.cap import Cap, Term
from autopeft.core.menu import Option
from autopeft.core.site import Place
from autopeft.errors import UsageError


def option(site: str) -> Option:
    return Option(site, "m", 1, Cost.plain(1, 1), 1.0, (Place(site, "weight"),))


def test_hand_worked_use() -> None:
    """10 without anything; 1 and 2 alone; block 0 costs 5 and brings block 1 with it, at 7."""
    first, last = ("first", "m", 1), ("last", "m", 1)
    cap = Cap("units", 100.0, 10.0, {first: 1.0, last: 2.0}, (Term(5.0), Term(7.0, 0)), {first: (0,), last: (1,)})
    assert cap.used([]) == 10.0
    assert cap.used([option("last")]) == 10 + 2 + 7
    assert cap.used([option("first")]) == 10 + 1 + 5 + 7
    assert cap.used([option("first"), option("last")]) == 10 + 1 + 2 + 5 + 7
    assert cap.used([option("unknown")]) == 10.0


def test_a_limit_that_nothing_keeps() -> None:
    with pytest.raises(UsageError, match="bytes: the limit of 9 is less than the 10 that are used without any adapter"):
        Cap("bytes", 9.0, 10.0)


def test_amounts_and_order_are_checked() -> None:
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        Cap("bytes", 9.0, terms=(Term(-1.0),))
    with pytest.raises(ValueError, match="comes before the term that brings it"):
        Cap("bytes", 9.0, terms=(Term(1.0, 1), Term(1.0)))
