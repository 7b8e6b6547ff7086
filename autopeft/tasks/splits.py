"""Which sample trains, which one the search looks at, and which one judges at the end."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

from autopeft.core.codec import decode, encode
from autopeft.core.outcome import Split
from autopeft.errors import CorruptFile, DataError, UsageError
from autopeft.store.atomic import read_json, write_json
from autopeft.tasks.cut import CutRule, check_classes
from autopeft.tasks.sources.source import Sample

__all__ = ["Portion", "Splits"]

_log = logging.getLogger("autopeft.tasks")

_SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Portion:
    """The samples of one split.

    Attributes:
        names: the sample's names, as their source calls them.
        labels: their classes.
        pixels: 32 hexadecimal digits of the SHA-256 of their decoded pixels.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    pixels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.labels) == len(self.pixels):
            raise ValueError(
                f"names, labels and pixels differ: {len(self.names)}, {len(self.labels)}, {len(self.pixels)}"
            )

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Splits:
    """A data set, cut, as `splits.json` keeps it.

    Attributes:
        classes: class names in label order.
        rule: how it was cut.
        inner: trains.
        outer: what the search sees.
        test: judges, once.
        removed: samples taken out because the same pixels are in a later split.

    Raises:
        ValueError: when a sample is in two splits.
        DataError: naming class and counts, when a split lacks a class.
    """

    classes: tuple[str, ...]
    rule: CutRule
    inner: Portion
    outer: Portion
    test: Portion
    removed: int = 0

    SCHEMA: ClassVar[str] = "autopeft.splits/1"

    def __post_init__(self) -> None:
        names = [name for split in _SPLITS for name in self[split].names]
        if len(set(names)) != len(names):
            raise ValueError("a sample is in two splits or twice in one")
        check_classes(
            self.classes, {split: self[split].labels for split in _SPLITS}, f"{self.removed} duplicates removed"
        )

    def __getitem__(self, split: Split) -> Portion:
        portion: Portion = getattr(self, split)
        return portion

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over classes, names, labels and pixels of every split."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for split in _SPLITS:
            portion = self[split]
            digest.update(repr((split, portion.names, portion.labels, portion.pixels)).encode())
        return digest.hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, encode(self))

    @classmethod
    def read(cls, path: Path) -> Splits:
        """What `write` wrote.

        Raises:
            CorruptFile: when the file does not hold splits.
        """
        try:
            return decode(cls, read_json(path), str(path))
        except (DataError, UsageError) as error:
            raise CorruptFile(f"{path} does not hold usable splits: {error}") from error

    @classmethod
    def without_leaks(
        cls,
        classes: tuple[str, ...],
        rule: CutRule,
        samples: Mapping[Split, Sequence[Sample]],
        pixels: Mapping[str, str],
    ) -> Splits:
        """Splits of which no two share an image.

        A sample whose pixels are also in a later split (inner, outer, test, in this order) is left out of the earlier
        one, whatever its label, with a warning: what is measured is never trained on. Duplicates inside one split
        stay.

        Args:
            classes: class names in label order.
            rule: how the samples were cut.
            samples: the samples per split.
            pixels: sample name to hash of its pixels.

        Raises:
            DataError: when a split loses its last sample of a class in this way.
        """
        later: set[str] = set()
        portions: dict[Split, Portion] = {}
        leaks: dict[Split, list[str]] = {}
        for split in reversed(_SPLITS):
            kept = [s for s in samples[split] if pixels[s.name] not in later]
            leaks[split] = [s.name for s in samples[split] if pixels[s.name] in later]
            later |= {pixels[s.name] for s in kept}
            portions[split] = Portion(
                tuple(s.name for s in kept), tuple(s.label for s in kept), tuple(pixels[s.name] for s in kept)
            )
        removed = sum(len(names) for names in leaks.values())
        for split in _SPLITS:
            if leaks[split]:
                _log.warning(
                    "%d of %d images of split %s are also in a later split and were left out, such as %s",
                    len(leaks[split]),
                    len(samples[split]),
                    split,
                    leaks[split][0],
                )
        return cls(classes, rule, portions["inner"], portions["outer"], portions["test"], removed)
