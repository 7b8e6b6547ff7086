from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from autopeft.errors import DataError
from autopeft.tasks.sources.folder import open_folder

Tree = Callable[[dict[str, int]], Path]


def test_one_tree(tree: Tree) -> None:
    source = open_folder(tree({"dog": 2, "cat": 3}))
    assert source.classes == ("cat", "dog")
    assert {part: len(s) for part, s in source.parts.items()} == {"all": 5}
    assert [s.name for s in source.parts["all"]][:2] == ["cat/img0.png", "cat/img1.png"]
    assert source.parts["all"][0].load().size == (12, 10)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_and_val_under_each_of_its_names(tree: Tree, val: str) -> None:
    source = open_folder(tree({"train/a": 2, "train/b": 2, f"{val}/a": 1, f"{val}/b": 1}))
    assert {part: len(s) for part, s in source.parts.items()} == {"train": 4, "val": 2}


def test_three_parts(tree: Tree) -> None:
    source = open_folder(tree({f"{part}/{c}": 1 for part in ("train", "val", "test") for c in "ab"}))
    assert list(source.parts) == ["train", "val", "test"]


def test_train_alone_is_one_tree(tree: Tree) -> None:
    assert list(open_folder(tree({"train/a": 2, "train/b": 2})).parts) == ["all"]


def test_classes_and_order_are_timms(tree: Tree) -> None:
    root = tree({"x/class10": 11, "y/class9": 2, "z/deep/class1": 1})
    source = open_folder(root)
    theirs, index = find_images_and_targets(str(root))
    assert source.classes == tuple(index)
    assert [(str(root / s.name), s.label) for s in source.parts["all"]] == theirs


def test_hidden_folders_and_other_files_are_passed_over(tree: Tree, picture: Callable[[Path, int], None]) -> None:
    root = tree({"a": 2, "b": 2})
    for stray in ("a/.thumbnails/x.png", "__MACOSX/a/x.png", ".git/x.png", "a/._img0.png"):
        picture(root / stray, 9)
    (root / "a" / "notes.txt").write_text("no image")
    (root / "readme.md").write_text("no image")
    source = open_folder(root)
    assert source.classes == ("a", "b")
    assert len(source.parts["all"]) == 4


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file"):
        open_folder(tmp_path / "file")


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in class folders below .*\.jpg"):
        open_folder(tmp_path)


def test_an_empty_class_folder_is_named(tree: Tree) -> None:
    with pytest.raises(DataError, match=r"class folder .*/train/bird holds no images"):
        open_folder(tree({"train/cat": 2, "train/dog": 2, "train/bird": 0, "val/cat": 1, "val/dog": 1}))


def test_one_class(tree: Tree) -> None:
    with pytest.raises(DataError, match="only the class 'cat'; classification needs at least two"):
        open_folder(tree({"cat": 4}))


def test_images_without_class_folders(tree: Tree) -> None:
    with pytest.raises(DataError, match=r"holds images directly, such as img0\.png"):
        open_folder(tree({".": 3}))
    with pytest.raises(DataError, match=r"train holds images directly"):
        open_folder(tree({"train": 3}))


def test_a_class_that_only_one_part_has_is_named(tree: Tree) -> None:
    with pytest.raises(DataError, match="no image of class 'dog' in its val part"):
        open_folder(tree({"train/cat": 2, "train/dog": 2, "val/cat": 2}))


def test_val_without_train(tree: Tree) -> None:
    with pytest.raises(DataError, match=r"no train"):
        open_folder(tree({"val/cat": 2, "val/dog": 2}))


def test_a_class_may_be_called_like_a_part(tree: Tree) -> None:
    assert open_folder(tree({"test": 2, "control": 2})).classes == ("control", "test")


def test_the_folder_above_the_right_one(tree: Tree) -> None:
    root = tree({"pets/train/cat": 2, "pets/train/dog": 2, "pets/val/cat": 2, "pets/val/dog": 2})
    with pytest.raises(DataError, match=r"did you mean .*/data/pets\?"):
        open_folder(root)


def test_two_folders_for_one_part(tree: Tree) -> None:
    with pytest.raises(DataError, match="two folders for its val part"):
        open_folder(tree({f"{part}/{c}": 1 for part in ("train", "val", "valid") for c in "ab"}))
