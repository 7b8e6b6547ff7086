"""Labelled images that have been found but not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from autopeft.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Part", "Sample", "Source"]

Part = Literal["all", "train", "val", "test"]
"""How a data set comes divided: one tree (`all`), or `train` with `val`, `test` or both."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image.

    Attributes:
        name: unique in its source and the same on every machine: a path relative to the data's root, or part and
            number.
        label: index into the source's classes.
        load: reads the image in 8-bit RGB; raises `DataError` naming the file when it cannot be read.
    """

    name: str
    label: int
    load: Callable[[], Image.Image]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set as it lies there.

    Attributes:
        title: what to call it in messages.
        classes: class names in label order, at least two unless the images are unlabelled.
        parts: `all` alone, or `train` with `val`, `test` or both.
        counts: how many samples the inner, outer and test split of one tree have unless the user says otherwise.
        unlabelled: whether there are no classes but one that all images are in.

    Raises:
        DataError: for data without images, of a single class, or whose parts differ in their classes.
    """

    title: str
    classes: tuple[str, ...]
    parts: Mapping[Part, tuple[Sample, ...]]
    counts: tuple[int, int, int] | None = None
    unlabelled: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.parts) - set(get_args(Part))
        if unknown or not self.parts:
            raise ValueError(f"parts must be among {get_args(Part)}, got {tuple(self.parts)}")
        if not any(self.parts.values()):
            raise DataError(f"{self.title} holds no images")
        if "all" not in self.parts and "train" not in self.parts:
            raise DataError(f"{self.title} has {' and '.join(self.parts)} but no train; add the training images")
        if set(self.parts) == {"train"}:
            object.__setattr__(self, "parts", {"all": self.parts["train"]})
        if len(self.classes) < 2 and not self.unlabelled:
            found = f"only the class {self.classes[0]!r}" if self.classes else "no class"
            raise DataError(f"{self.title} holds {found}; classification needs at least two classes")
        for part, samples in self.parts.items():
            present = {sample.label for sample in samples}
            for label, name in enumerate(self.classes):
                if label not in present:
                    where = "" if part == "all" else f" in its {part} part"
                    raise DataError(f"{self.title} has no image of class {name!r}{where}; every class must be there")
