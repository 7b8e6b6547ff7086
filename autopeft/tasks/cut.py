"""How a data set is cut: seeded, stratified, blind to the order of the samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from autopeft.core.outcome import Split
from autopeft.errors import DataError, UsageError
from autopeft.tasks.sources.source import Part, Sample, Source

__all__ = ["CutRule", "check_classes", "cut", "quotas"]


@dataclass(frozen=True, slots=True)
class CutRule:
    """How a data set is cut.

    Attributes:
        seed: which samples go where.
        val_frac: share of one tree, or of the train part, that becomes outer; None means 0.2 or the source's counts.
        test_frac: share of one tree that becomes test; unused when the source brings a test split or `val`.
        max_samples: at most this many samples of the source are used, the same share of each part and class.
        max_inner: at most this many samples stay in inner, stratified.

    Raises:
        UsageError: for shares outside of (0, 1) or that leave nothing to train on, and limits below 1.
    """

    seed: int = 0
    val_frac: float | None = None
    test_frac: float | None = None
    max_samples: int | None = None
    max_inner: int | None = None

    def __post_init__(self) -> None:
        for name in ("val_frac", "test_frac"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UsageError(f"{name} is a share between 0 and 1, got {value}")
        if (self.val_frac or 0.2) + (self.test_frac or 0.2) >= 1:
            raise UsageError(
                f"val_frac and test_frac leave nothing to train on: {self.val_frac or 0.2} + {self.test_frac or 0.2}"
            )
        for name in ("max_samples", "max_inner"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise UsageError(f"{name} must be at least 1, got {limit}")


def cut(source: Source, rule: CutRule) -> dict[Split, tuple[Sample, ...]]:
    """Cut a source into inner, outer and test: seeded, stratified, blind to the order of the samples.

    One tree is cut 60/20/20, or by the source's own counts where it has some and the rule names no share. With train
    and val only, outer is cut from train and val is the test; with train and test only likewise; with all three,
    each keeps its part. Within a split samples stay in the source's order.

    Raises:
        DataError: naming class and counts, when a class has too few samples to be in every split.
        UsageError: when `max_inner` is below the number of classes.
    """
    parts = _limited(source, rule) if rule.max_samples is not None else dict(source.parts)
    val_frac = Fraction(str(0.2 if rule.val_frac is None else rule.val_frac))
    test_frac = Fraction(str(0.2 if rule.test_frac is None else rule.test_frac))
    picker = _Picker(source.classes, rule.seed)
    if "all" in parts:
        rest = parts["all"]
        n_test, n_outer = round(test_frac * len(rest)), round(val_frac * len(rest))
        n_inner: int | None = None
        own = source.counts if rule.val_frac is None and rule.test_frac is None else None
        if own is not None and len(rest) >= sum(own):
            n_inner, n_outer, n_test = own
        test, rest = picker.take(rest, n_test, "test", 2)
        outer, inner = picker.take(rest, n_outer, "outer", 1)
        if n_inner is not None and len(inner) > n_inner:
            inner, _ = picker.take(inner, n_inner, "inner", 0)
    elif "val" in parts and "test" in parts:
        inner, outer, test = parts["train"], parts["val"], parts["test"]
    else:
        test = parts["val"] if "val" in parts else parts["test"]
        outer, inner = picker.take(parts["train"], round(val_frac * len(parts["train"])), "outer", 1)
    if rule.max_inner is not None and len(inner) > rule.max_inner:
        if rule.max_inner < len(source.classes):
            raise UsageError(
                f"max_inner={rule.max_inner} leaves no sample for some of the {len(source.classes)} classes"
            )
        inner, _ = picker.take(inner, rule.max_inner, "inner", 0)
    found: dict[Split, tuple[Sample, ...]] = {"inner": inner, "outer": outer, "test": test}
    note = "" if rule.max_samples is None else f"with max_samples={rule.max_samples}"
    check_classes(source.classes, {split: [s.label for s in samples] for split, samples in found.items()}, note)
    return found


def check_classes(classes: Sequence[str], labels: Mapping[Split, Sequence[int]], note: str = "") -> None:
    """Refuse splits that lack a class.

    Raises:
        DataError: naming the class and how many samples of it each split has.
    """
    tallies = {split: Counter(found) for split, found in labels.items()}
    for label, name in enumerate(classes):
        counts = {split: tally[label] for split, tally in tallies.items()}
        if not all(counts.values()):
            listed = ", ".join(f"{split} {n}" for split, n in counts.items())
            raise DataError(
                f"class {name!r} must be in every split and is not: {listed}{f' ({note})' if note else ''}; "
                "add images of it or take it out"
            )


def quotas(sizes: Sequence[int], take: int, keep: int) -> list[int]:
    """How many of each class to take so that `take` in all are taken in proportion.

    Largest remainders, ties to the lower class; at least 1 of each class and at most its size less `keep`. When the
    bounds leave no way to take exactly `take`, the nearest possible total is taken.

    Args:
        sizes: samples per class.
        take: total to take.
        keep: samples of each class that must be left.
    """
    total = sum(sizes)
    high = [max(n - keep, 0) for n in sizes]
    low = [min(1, h) for h in high]
    ideal = [Fraction(n * take, total) for n in sizes]
    found = [min(max(int(x), lo), hi) for x, lo, hi in zip(ideal, low, high, strict=True)]
    while sum(found) < take and any(f < h for f, h in zip(found, high, strict=True)):
        room = [c for c in range(len(sizes)) if found[c] < high[c]]
        found[max(room, key=lambda c: (ideal[c] - found[c], -c))] += 1
    while sum(found) > take and any(f > lo for f, lo in zip(found, low, strict=True)):
        room = [c for c in range(len(sizes)) if found[c] > low[c]]
        found[min(room, key=lambda c: (ideal[c] - found[c], c))] -= 1
    return found


def _limited(source: Source, rule: CutRule) -> dict[Part, tuple[Sample, ...]]:
    assert rule.max_samples is not None
    total = sum(len(samples) for samples in source.parts.values())
    share = Fraction(min(rule.max_samples, total), total)
    picker = _Picker(source.classes, rule.seed)
    return {
        part: picker.take(samples, max(1, int(share * len(samples))), "max_samples", 0)[0]
        for part, samples in source.parts.items()
    }


class _Picker:
    """Chooses samples by the hash of seed, purpose and name: the same on every machine and in every library version."""

    def __init__(self, classes: tuple[str, ...], seed: int) -> None:
        self._classes, self._seed = classes, seed

    def take(
        self, samples: tuple[Sample, ...], n: int, purpose: str, keep: int
    ) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """Taken and left, both in the order they came in."""
        by_class: list[list[Sample]] = [[] for _ in self._classes]
        for sample in samples:
            by_class[sample.label].append(sample)
        taken: set[str] = set()
        for group, quota in zip(by_class, quotas([len(g) for g in by_class], n, keep), strict=True):
            taken |= {s.name for s in sorted(group, key=lambda s: self._rank(s, purpose))[:quota]}
        return tuple(s for s in samples if s.name in taken), tuple(s for s in samples if s.name not in taken)

    def _rank(self, sample: Sample, purpose: str) -> bytes:
        return hashlib.sha256(f"{self._seed}\0{purpose}\0{sample.name}".encode()).digest()
