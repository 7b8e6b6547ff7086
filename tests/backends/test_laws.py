"""The native backend keeps the laws, and every law has a backend that breaks it."""

from __future__ import annotations

import pytest

from autopeft.backends.native import Native
from autopeft.core.contracts import Backend
from autopeft.testing.backend_laws import BROKEN, BackendLaws

LAWS = sorted(name for name in dir(BackendLaws) if name.startswith("test_"))


class TestNative(BackendLaws):
    def make(self) -> Backend:
        return Native()


def test_every_law_has_a_backend_that_breaks_it() -> None:
    assert sorted(BROKEN) == LAWS


@pytest.mark.parametrize("broken", LAWS)
def test_broken_backend_fails_its_law_and_no_other(broken: str) -> None:
    class Laws(BackendLaws):
        plans = ("vit", "head only")

        def make(self) -> Backend:
            return BROKEN[broken]()

    failed = []
    for law in LAWS:
        try:
            getattr(Laws(), law)()
        except AssertionError:
            failed.append(law)
    assert failed == [broken]
