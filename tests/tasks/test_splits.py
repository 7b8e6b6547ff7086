from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from autopeft.errors import CorruptFile, DataError
from autopeft.tasks.cut import CutRule
from autopeft.tasks.sources.source import Sample
from autopeft.tasks.splits import Portion, Splits


def blank() -> Image.Image:
    return Image.new("RGB", (2, 2))


def samples(sizes: list[int], prefix: str = "") -> tuple[Sample, ...]:
    return tuple(Sample(f"{prefix}{c}/{i}", c, blank) for c, n in enumerate(sizes) for i in range(n))


def made(pixels: dict[str, str], **parts: list[int]) -> Splits:
    found = {split: samples(sizes, f"{split}/") for split, sizes in parts.items()}
    everything = {s.name: s.name for split in found.values() for s in split}
    return Splits.without_leaks(("c0", "c1"), CutRule(), found, everything | pixels)  # type: ignore[arg-type]


def test_duplicates_leave_the_earlier_split_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    same = {"inner/0/0": "x", "outer/1/0": "x", "inner/1/0": "y", "test/0/0": "y", "inner/0/1": "z", "inner/0/2": "z"}
    with caplog.at_level(logging.WARNING, "autopeft.tasks"):
        splits = made(same, inner=[3, 3], outer=[2, 2], test=[2, 2])
    assert splits.removed == 2
    assert splits.inner.names == ("inner/0/1", "inner/0/2", "inner/1/1", "inner/1/2")
    assert (len(splits.outer), len(splits.test)) == (4, 4)
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 6 images of split inner are also in a later split and were left out, such as inner/0/0"
    ]


def test_no_warning_without_duplicates(caplog: pytest.LogCaptureFixture) -> None:
    assert made({}, inner=[3, 3], outer=[2, 2], test=[2, 2]).removed == 0
    assert not caplog.records


def test_a_class_that_vanishes_with_its_duplicates_is_an_error() -> None:
    same = {"inner/0/0": "x", "test/0/0": "x"}
    with pytest.raises(DataError, match=r"class 'c0'.*inner 0, outer 2, test 2 \(1 duplicates removed\)"):
        made(same, inner=[1, 3], outer=[2, 2], test=[2, 2])


def test_splits_are_read_back_identically(tmp_path: Path) -> None:
    splits = made({"inner/0/0": "x", "test/0/0": "x"}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    path = tmp_path / "splits.json"
    splits.write(path)
    assert Splits.read(path) == splits
    assert Splits.read(path).digest == splits.digest
    assert json.loads(path.read_text())["schema"] == "autopeft.splits/1"


def test_the_digest_covers_names_labels_pixels_and_splits() -> None:
    base = made({}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    other_pixels = made({"inner/0/0": "x"}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    inner = base.inner
    swapped = Portion(inner.names, inner.labels[::-1], inner.pixels)
    renamed = Portion(("new", *inner.names[1:]), inner.labels, inner.pixels)
    digests = {base.digest, other_pixels.digest} | {
        Splits(base.classes, base.rule, portion, base.outer, base.test).digest for portion in (swapped, renamed)
    }
    moved = Splits(base.classes, base.rule, base.outer, base.inner, base.test)
    assert len(digests | {moved.digest}) == 5


def test_a_sample_in_two_splits_is_refused() -> None:
    base = made({}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    with pytest.raises(ValueError, match="in two splits"):
        Splits(base.classes, base.rule, base.inner, base.inner, base.test)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("inner"),
        lambda d: d["inner"]["names"].pop(),
        lambda d: d["test"].update(labels=[0] * len(d["test"]["labels"])),
        lambda d: d["rule"].update(val_frac=3.0),
        lambda d: d.update(schema="autopeft.splits/9"),
    ],
)
def test_damaged_splits_are_corrupt(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "splits.json"
    made({}, inner=[3, 3], outer=[2, 2], test=[2, 2]).write(path)
    data = json.loads(path.read_text())
    damage(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptFile, match=r"splits\.json"):
        Splits.read(path)
