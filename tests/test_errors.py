from __future__ import annotations

import inspect
import re

import pytest

from autopeft import errors
from autopeft.errors import AutopeftError, InfeasibleBudget, MissingDependency

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, AutopeftError)]


def drawn() -> dict[str, tuple[int, int | None]]:
    """Name to depth in the drawing and exit code written beside it."""
    lines: dict[str, tuple[int, int | None]] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^((?:│   |    |├── |└── )*)([A-Z]\w+)(?: +(\d+))?\b", line)
        if match and match[2] in errors.__all__:
            lines[match[2]] = (len(match[1]) // 4, int(match[3]) if match[3] else None)
    return lines


@pytest.mark.parametrize("cls", CLASSES)
def test_the_drawing_is_the_tree(cls: type[AutopeftError]) -> None:
    depth, code = drawn()[cls.__name__]
    assert len(cls.__mro__) - len(AutopeftError.__mro__) == depth
    if code is None:
        assert cls.exit_code == cls.__mro__[1].exit_code, "a branch without a code has its parent's"
    else:
        assert cls.exit_code == code


def test_exit_codes_are_those_of_the_command_line() -> None:
    # 7 (nothing gained) is no error, 130 is the interrupt's.
    assert {cls.exit_code for cls in CLASSES} == {1, 2, 3, 4, 5, 6, 8, 75}


def test_a_missing_package_says_how_to_install_it() -> None:
    error = MissingDependency("psycopg", "postgres", "reach the storage")
    assert str(error) == (
        "the package 'psycopg' is needed to reach the storage, and it is not installed. "
        "Install it with: pip install 'autopeft[postgres]'"
    )


def test_an_infeasible_budget_carries_the_cheapest_option() -> None:
    assert InfeasibleBudget("too small", 64).cheapest == 64
    assert InfeasibleBudget("no option").cheapest is None
