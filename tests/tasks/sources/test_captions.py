from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import DataError
from autopeft.tasks.sources.captions import METADATA, open_captions, open_unlabelled

Picture = Callable[[Path, int], None]


def write(root: Path, picture: Picture, rows: Mapping[str, Mapping[str, Any]]) -> Path:
    for number, name in enumerate(rows):
        picture(root / name, number)
    lines = [json.dumps({"file_name": name, **row}) for name, row in rows.items()]
    (root / METADATA).write_text("\n".join(lines) + "\n\n")
    return root


def test_captions_masks_and_priors(tmp_path: Path, picture: Picture) -> None:
    picture(tmp_path / "m.png", 9)
    found = open_captions(
        write(tmp_path, picture, {"a.png": {"text": "one", "mask": "m.png"}, "b/c.png": {"prior": True}})
    )
    samples = found.source.parts["all"]
    assert [s.name for s in samples] == ["a.png", "b/c.png"]
    assert found.source.classes == ("all",)
    assert found.texts == {"a.png": "one"}
    assert found.priors == {"b/c.png"}
    mask = found.mask("a.png")
    assert mask is not None
    assert mask.size == (12, 10)
    assert found.mask("b/c.png") is None
    assert samples[1].load().size == (12, 10)


def test_labels_and_parts(tmp_path: Path, picture: Picture) -> None:
    write(tmp_path / "train", picture, {"a.png": {"label": "cat"}, "b.png": {"label": "dog"}})
    write(tmp_path / "validation", picture, {"a.png": {"label": "dog"}, "b.png": {"label": "cat"}})
    found = open_captions(tmp_path).source
    assert found.classes == ("cat", "dog")
    assert {part: [(s.name, s.label) for s in samples] for part, samples in found.parts.items()} == {
        "train": [("train/a.png", 0), ("train/b.png", 1)],
        "val": [("validation/a.png", 1), ("validation/b.png", 0)],
    }


def test_images_without_classes(tmp_path: Path, picture: Picture) -> None:
    for i in (10, 2):
        picture(tmp_path / f"img{i}.png", i)
    (tmp_path / "notes.txt").write_text("no image")
    found = open_unlabelled(tmp_path)
    assert [(s.name, s.label) for s in found.parts["all"]] == [("img2.png", 0), ("img10.png", 0)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_unlabelled(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "b.png"}', "give all or none one"),
        ('{"file_name": "a.png"}\n{"file_name": "absent.png"}', r"line 2 of .* absent.png, which does not exist"),
        ('{"file": "a.png"}', r"line 1 of .* has no file_name"),
        ("nonsense", "is no JSON"),
        ('{"file_name": "a.png"}\n{"file_name": "a.png"}', r"line 2 of .* a second time"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, picture: Picture, text: str, message: str) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, 0)
    (tmp_path / METADATA).write_text(text)
    with pytest.raises(DataError, match=message):
        open_captions(tmp_path)


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=METADATA):
        open_captions(tmp_path)
