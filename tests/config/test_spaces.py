from __future__ import annotations

import math
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from autopeft.config.override import override
from autopeft.config.registries import METHODS
from autopeft.config.spaces import load_space, space_names, spaces_folder
from autopeft.config.study import Study
from autopeft.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def test_the_named_spaces() -> None:
    masks = ("memcontrol_attention", "memcontrol_difffit", "memcontrol_svdiff")
    assert space_names() == ("core_only", "lora_only", *masks, "mixed_methods", "subject", "tradeoff", "wide")


@pytest.mark.parametrize("name", ["core_only", "lora_only", "mixed_methods", "tradeoff", "wide"])
def test_every_knob_leads_somewhere_in_the_study(default: Study, name: str) -> None:
    space = load_space(name)
    named = {f"gain.methods.{key}" for key in METHODS} - {f"gain.methods.{key}" for key in default.methods}
    count = len({knob.path for knob in space} - named)
    assert count == 12 if name == "mixed_methods" else 8 <= count <= (24 if name == "wide" else 12), (
        "knobs that matter to the default study"
    )
    # LoRA has no alpha until one is given.
    assert set(space.defaults) == {knob.path for knob in space} - {"methods.lora.alpha"}
    assert override(default, space.defaults).train == default.train, "learning rates start at their defaults"
    for knob in space:
        for value in (knob.low, knob.high, *knob.choices):
            if value is not None:
                override(default, {knob.path: value})


@pytest.mark.parametrize("name", ["core_only", "lora_only", "mixed_methods", "tradeoff", "wide"])
def test_the_defaults_leave_every_gain_as_it_is(default: Study, name: str) -> None:
    gain = override(default, load_space(name).defaults).gain
    assert gain.correct(0.04, "lora", "qkv", 0.5) == default.gain.correct(0.04, "lora", "qkv", 0.5)


def test_the_mixed_space_is_relative_to_core() -> None:
    paths = [knob.path for knob in load_space("mixed_methods")]
    assert "gain.methods.core" not in paths
    knob = next(k for k in load_space("mixed_methods") if k.path == "gain.methods.lora")
    assert (knob.low, knob.high, knob.log, knob.default) == (0.125, 8.0, True, 1.0)
    assert math.isclose(math.sqrt(0.125 * 8.0), 1.0), "the default is the middle of the logarithmic range"


def test_the_wide_space_has_everything_of_the_mixed_one_and_alpha_and_decay() -> None:
    mixed = {knob.path: knob for knob in load_space("mixed_methods")}
    wide = {knob.path: knob for knob in load_space("wide")}
    assert mixed.items() <= wide.items()
    assert {"methods.lora.alpha", "train.weight_decay", "gain.depth_curvature"} <= set(wide) - set(mixed)


def test_a_space_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train.amp: {choices: [off, bf16]}\ngain.exponent: {low: 1e-1, high: 1}\nn: {choices: [1, 2.5]}\n")
    space = load_space(str(path))
    assert [knob.choices for knob in space] == [("off", "bf16"), (), (1, 2.5)]
    assert (space.knobs[1].low, space.knobs[1].high, space.knobs[1].default) == (0.1, 1.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping of dotted paths to ranges"),
        ("[1]", "a mapping of dotted paths to ranges"),
        ("a.b: 3", "knob 'a.b' needs low and high, or choices, got 3"),
        ("a.b: {low: 1, hihg: 2}", r"mine\.yaml: a\.b has no key 'hihg'\. Did you mean 'high'\?"),
        ("a.b: {low: 1}", "knob 'a.b' needs either low and high, or choices"),
        ("a.b: {low: x, high: 2}", r"a\.b\.low: expected a number, got 'x'"),
        ("a.b: {path: c, low: 1, high: 2}", "knob 'a.b' needs low and high"),
        ("a.b: {low: 1, high: 2}\na.b: {low: 1, high: 3}", "line 2, column 1: the key 'a.b' stands twice"),
    ],
)
def test_a_file_that_is_no_space(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_space(str(path))


def test_a_space_nobody_knows() -> None:
    with pytest.raises(UsageError, match=r"no search space is called 'mixed_method'\. Did you mean 'mixed_methods'\?"):
        load_space("mixed_method")
    with pytest.raises(UsageError, match=r"cannot read the search space none\.yaml: No such file"):
        load_space("none.yaml")


def test_spaces_lie_beside_the_package_in_a_checkout_and_inside_it_in_a_wheel(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "autopeft"
    package.mkdir(parents=True)
    with pytest.raises(UsageError, match="install it again"):
        spaces_folder(package)
    (package.parent / "search_spaces").mkdir()
    assert spaces_folder(package) == package.parent / "search_spaces"
    (package / "_spaces").mkdir()
    assert spaces_folder(package) == package / "_spaces"


def test_the_build_puts_the_spaces_into_the_wheel() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"] == {"search_spaces": "autopeft/_spaces"}


@pytest.mark.slow
def test_a_wheel_finds_its_spaces_inside_the_package(tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(wheel, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from autopeft.config.spaces import load_space, space_names, spaces_folder;"
        "print(spaces_folder()); [load_space(name) for name in space_names()]"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "site")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "site" / "autopeft" / "_spaces")
