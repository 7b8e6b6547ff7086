import pytest

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Option
from autopeft.core.site import Place
from autopeft.errors import UsageError
from autopeft.report.rows import allocation_rows, spending


def test_rows_follow_the_sites_and_take_role_and_depth(options, sites):
    rows = allocation_rows(options, sites)
    assert [row.site for row in rows] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"]
    assert [(row.role, row.depth) for row in rows] == [("attn.qkv", 0), ("attn.qkv", 1), ("mlp.fc1", 1)]


def test_rows_without_sites_keep_their_order_and_guess_the_role(options):
    rows = allocation_rows(options)
    assert [row.site for row in rows] == [option["site"] for option in options]
    assert [(row.role, row.depth) for row in rows] == [("mlp.fc1", None), ("attn.qkv", None), ("attn.qkv", None)]


def test_rows_of_an_allocation_join_the_slots():
    places = (Place("a", "bias"), Place("a", "weight"))
    option = Option("a", "norm", 1, Cost.plain(6, 6), 0.25, places)
    (row,) = allocation_rows(Allocation((option,), Budget(10)))
    assert (row.slot, row.cost, row.gain, row.method) == ("bias+weight", 6, 0.25, "norm")


def test_an_option_without_a_key_is_refused_by_name(options):
    del options[0]["gain"]
    with pytest.raises(UsageError, match="lacks gain"):
        allocation_rows(options)


def test_spending_adds_up_and_breaks_ties_by_name(options):
    rows = allocation_rows(options)
    assert spending(rows, lambda row: row.method) == {"core": 32, "bias": 8}
    tied = spending(rows[1:], lambda row: row.site)
    assert list(tied.items()) == [("blocks.0.attn.qkv", 16), ("blocks.1.attn.qkv", 16)]
