from __future__ import annotations

import inspect
import typing

from autopeft.core import contracts


def test_every_contract_is_a_documented_protocol_of_documented_members() -> None:
    for name in contracts.__all__:
        contract = getattr(contracts, name)
        assert typing.is_protocol(contract) if hasattr(typing, "is_protocol") else contract._is_protocol, name
        members = [member for key, member in vars(contract).items() if not key.startswith("_")]
        assert members, name
        for member in members:
            function = member.fget if isinstance(member, property) else member
            assert inspect.getdoc(function), f"{name}.{function.__name__}"


def test_the_laws_of_a_contract_stand_in_its_docstring() -> None:
    for name in ("Task", "Scorer", "Method", "Allocator", "Backend", "Reward", "Searcher", "Exporter"):
        assert "Laws:" in (getattr(contracts, name).__doc__ or ""), name
