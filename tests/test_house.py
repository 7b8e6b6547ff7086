"""The rules of the house, checked where everything else is checked: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autopeft
from autopeft import errors
from autopeft.config.registries import ROOMS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "autopeft"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = ROOT / "tests"

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "autopeft",
    "pyproject.toml",
    "search_spaces",
    "studies",
    "tests",
}

IMPORTED_LATE = ("torch", "timm", "optuna", "peft")
LIGHT = ("autopeft.cli.main", "autopeft.core", "autopeft.report", "autopeft.store", "autopeft.errors")


def dotted(path: Path) -> str:
    """The module's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    """The module's syntax; read once, so nobody may change it."""
    return ast.parse(path.read_text(encoding="utf-8"))


def committed_list(name: str) -> list[str]:
    """The lines of a list that is kept beside the tests, without comments."""
    lines = (TESTS / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def run(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a tool in the root; what it says is the test's message."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


# Tools


def test_ruff_finds_nothing() -> None:
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_ruff_would_format_nothing() -> None:
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_mypy_finds_nothing() -> None:
    run(sys.executable, "-m", "mypy")


def test_imports_go_down_the_floors() -> None:
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert tool, "import-linter is not installed; pip install -e '.[test]'"
    run(tool, "--no-cache")


# Names


def public_definitions(path: Path) -> set[str]:
    """Names that the module defines itself, at its top level, for others."""
    names: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            if not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("TypeVar", "ParamSpec")):
                targets = [part for target in node.targets for part in getattr(target, "elts", [target])]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def imported(path: Path) -> set[str]:
    """Names that the module imports at its top level and may hand on."""
    nodes = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name) for node in nodes for alias in node.names}


def declared(path: Path) -> list[str] | None:
    """The module's `__all__`."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_says_which_names_are_for_others(path: Path) -> None:
    names = declared(path)
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert public_definitions(path) <= {"BUILTIN"}, "a room's __init__ holds its table and nothing else"
        return
    if names is None:
        assert path.name == "__main__.py" or not public_definitions(path), "the module has no __all__"
        return
    assert len(set(names)) == len(names)
    defined = public_definitions(path)
    assert defined <= set(names), "a public name is missing from __all__: list it, or begin it with an underscore"
    assert set(names) - defined - {"__version__"} <= imported(path), "__all__ lists a name that is not there"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_has_a_docstring(path: Path) -> None:
    assert (ast.get_docstring(tree(path)) or "").strip(), path


def test_no_room_is_called_utils() -> None:
    bad = {"utils", "util", "common", "helpers", "misc"}
    assert not [path for path in PACKAGE.rglob("*") if path.stem.lstrip("_") in bad]


def test_the_top_level_holds_what_the_design_names_and_no_more() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in tracked.splitlines()} <= TOP_LEVEL


# Errors


def test_every_exception_is_in_the_tree_and_drawn() -> None:
    drawing = errors.__doc__ or ""
    drawn = set(re.findall(r"^[│├└─ ]*([A-Z][A-Za-z]+)\b", drawing, re.MULTILINE)) - {"Every"}
    defined = {name for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)}
    assert drawn == defined == set(errors.__all__)
    for path in MODULES:
        if path.name == "errors.py" or path.parent.name == "testing":
            continue
        for node in ast.walk(tree(path)):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert not [base for base in bases if base.endswith(("Error", "Exception", "Warning"))], (
                f"{dotted(path)}.{node.name} is an exception; exceptions live in autopeft/errors.py"  # type: ignore[attr-defined]
            )


def test_nothing_is_raised_bare() -> None:
    """`raise Exception` and `raise RuntimeError` say nothing to a caller who wants to catch one thing."""
    found = [
        f"{dotted(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Raise)
        and node.exc is not None
        and ast.unparse(node.exc).split("(")[0] in ("Exception", "BaseException", "RuntimeError")
    ]
    assert not found, found


# Plug-ins


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, names in ROOMS.items() for name in names])
def test_a_plugin_is_a_frozen_slotted_dataclass_with_documented_behaviour(room: str, name: str) -> None:
    cls = ROOMS[room][name]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert "__slots__" in vars(cls)
    assert cls.__module__.startswith(f"autopeft.{room}.")
    for key, member in vars(cls).items():
        if inspect.isfunction(member) and not key.startswith("_"):
            assert inspect.getdoc(member), f"{cls.__qualname__}.{key}"


def test_the_tables_are_literal_and_lead_to_files_of_their_room() -> None:
    for room in ROOMS:
        path = PACKAGE / room / "__init__.py"
        table = importlib.import_module(f"autopeft.{room}").BUILTIN
        assignment = next(n for n in tree(path).body if isinstance(n, ast.Assign | ast.AnnAssign))
        assert assignment.value is not None
        assert ast.literal_eval(assignment.value) == table
        imports = [n for n in tree(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not imports, f"{path} imports something"


# Tests


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Dotted names that a test file imports, or gives to a subprocess as text."""
    nodes = list(ast.walk(tree(path)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def test_every_module_is_tested_in_its_own_room() -> None:
    """By the test file of its name, or by one of the room that imports it."""
    allowed = committed_list("untested_modules.txt")
    stale = [name for name in allowed if not (PACKAGE / name).exists()]
    assert not stale, f"tests/untested_modules.txt names what is gone: {stale}"
    missing = []
    for path in MODULES:
        inside = path.relative_to(PACKAGE)
        listed = any(inside.as_posix() == name or inside.as_posix().startswith(f"{name}/") for name in allowed)
        if listed or path.name in ("__init__.py", "__main__.py") or path.name.startswith("_"):
            continue
        # The laws are tested where they are applied: in every room that has plug-ins.
        room = TESTS if inside.parts[0] == "testing" else TESTS / inside.parent
        mirrored = (room / f"test_{inside.stem}.py").is_file()
        if not mirrored and not any(dotted(path) in names_in(test) for test in room.rglob("*.py")):
            missing.append(inside.as_posix())
    assert not missing, "no test of the room imports these"


def test_the_list_of_skips_names_tests_that_exist_and_reasons() -> None:
    for line in committed_list("allowed_skips.txt"):
        place, _, reason = line.partition(": ")
        assert (ROOT / place.split("::")[0]).is_file(), line
        assert reason, line


@pytest.mark.parametrize(
    ("ci", "reason", "code", "workers"),
    [("true", "no luck", 1, "0"), ("true", "no luck", 1, "1"), ("true", "known: today", 0, "1"), ("", "x", 0, "0")],
)
def test_a_skip_that_is_not_listed_fails_the_run_of_ci(
    tmp_path: Path, ci: str, reason: str, code: int, workers: str
) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "allowed_skips.txt").write_text("# comment\ntest_it.py: known\n")
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it(): pytest.skip({reason!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "CI": ci},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("skips that allowed_skips.txt does not list" in done.stdout) == bool(code)


# Behaviour


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_start_fast_imports_nothing_heavy(module: str) -> None:
    code = (
        "import sys, importlib, pkgutil\n"
        f"room = importlib.import_module({module!r})\n"
        "for info in pkgutil.walk_packages(getattr(room, '__path__', []), room.__name__ + '.'):\n"
        "    importlib.import_module(info.name)\n"
        f"print(sorted(set({IMPORTED_LATE!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def calls(path: Path, name: str) -> Iterator[int]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node.lineno


def test_only_the_command_line_prints() -> None:
    found = [
        f"{dotted(path)}:{line}" for path in MODULES if path.parent != PACKAGE / "cli" for line in calls(path, "print")
    ]
    assert not found, found


def test_only_the_finish_and_the_tasks_speak_of_the_test_split() -> None:
    """The text "test" names the sealed split; whoever writes it could open it."""
    allowed = committed_list("test_split_readers.txt")
    found = set()
    for path in MODULES:
        inside = path.relative_to(PACKAGE).as_posix()
        if any(inside == name or inside.startswith(f"{name}/") for name in allowed):
            continue
        docstrings = {
            id(node.value)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and node.value == "test" and id(node) not in docstrings:
                found.add(f"{inside}:{node.lineno}")
    assert not found, sorted(found)


def test_the_version_is_the_one_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert match is not None
    assert match[1] == autopeft.__version__


def test_no_committed_file_names_a_machine_or_a_registry() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    pattern = r"https?://[a-z.]*(pypi|npm|debian)[a-z.]*/"
    done = subprocess.run(["git", "grep", "-nIE", pattern, "--", "."], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("tests/test_house.py:")]
    assert not lines, lines
