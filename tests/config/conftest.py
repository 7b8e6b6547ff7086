"""One default study for the tests that only look at it."""

from __future__ import annotations

import pytest

from autopeft.config.study import Study


@pytest.fixture(scope="session")
def default() -> Study:
    """The study of somebody who says nothing."""
    return Study()
