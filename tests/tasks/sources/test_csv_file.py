from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autopeft.errors import DataError, UnknownKey, UsageError
from autopeft.tasks.sources.csv_file import open_csv
from autopeft.tasks.sources.open import open_source


@pytest.fixture
def table(tmp_path: Path, picture: Callable[[Path, int], None]) -> Callable[[str], str]:
    for i in range(4):
        picture(tmp_path / f"pics/{i}.png", i)

    def write(text: str) -> str:
        (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
        return str(tmp_path / "labels.csv")

    return write


def test_a_table_of_own_columns(table: Callable[[str], str]) -> None:
    path = table(
        "id,path,y,fold\n1,pics/0.png,b,train\n2,pics/1.png,a,train\n3,pics/2.png,a,test\n4,pics/3.png,b,Test\n"
    )
    source = open_source(f"csv:{path}?image=path&label=y&split=fold")
    assert source.classes == ("a", "b")
    assert {part: [s.label for s in samples] for part, samples in source.parts.items()} == {
        "train": [1, 0],
        "test": [0, 1],
    }
    assert source.parts["train"][0].name == "pics/0.png"
    assert source.parts["train"][0].load().size == (12, 10)


def test_default_columns(table: Callable[[str], str]) -> None:
    rows = "\ufeffimage,label\npics/0.png, 10 \n\npics/1.png,9\n"
    source = open_csv(table(rows))
    assert source.classes == ("9", "10")
    assert list(source.parts) == ["all"]
    found = open_csv(
        table("image,label,split\npics/0.png,a,train\npics/1.png,b,train\npics/2.png,a,val\npics/3.png,b,val\n")
    )
    assert list(found.parts) == ["train", "val"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\nx.png,a\n", "no column 'image'.*Known: label, path"),
        ("image,labels\nx.png,a\n", "no column 'label'. Did you mean 'labels'"),
        ("image,label\n", "no rows"),
        ("", "no rows"),
        ("image,label\nx.png,a\ny.png,\n", "row 3: the column 'label' is empty"),
        ("image,label\nx.png,a\ny.png\n", "row 3: 1 cells, the header has 2"),
        ("image,label\nx.png,a\nx.png,b\n", r"row 3: the image x\.png was listed in row 2"),
        ("image,label\nx.png,a\ny.png,a\n", "only the class 'a'"),
        ("image,label,split\nx.png,a,train\ny.png,b,tset\n", "row 3: unknown split 'tset'. Did you mean 'test'"),
        ("image,label,split\nx.png,a,test\ny.png,b,test\n", "no train"),
        ('image,label\n"x.png,a\n', "not a comma-separated table"),
    ],
)
def test_bad_tables(table: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_csv(table(text))


def test_no_such_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the table .*none\.csv: No such file"):
        open_csv(str(tmp_path / "none.csv"))


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("image,label\nx.png,für\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        open_csv(str(tmp_path / "l.csv"))


def test_a_missing_image_names_file_and_row(table: Callable[[str], str]) -> None:
    source = open_csv(table("image,label\npics/9.png,a\npics/1.png,b\n"))
    with pytest.raises(DataError, match=r"pics/9\.png \(labels\.csv, row 2\) does not exist"):
        source.parts["all"][0].load()


def test_bad_settings() -> None:
    with pytest.raises(UnknownKey, match=r"'lable'.*Did you mean 'label'"):
        open_csv("x.csv?lable=y")
    with pytest.raises(UsageError, match=r"'label' .* has no value"):
        open_csv("x.csv?label=")
    with pytest.raises(UsageError, match=r"'label' .* is given twice"):
        open_csv("x.csv?label=a&label=b")
    with pytest.raises(UsageError, match="cannot read 'label'"):
        open_csv("x.csv?label")
