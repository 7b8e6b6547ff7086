"""The samples of a run's splits in the data as it lies there now."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from autopeft.core.outcome import Split
from autopeft.errors import StaleRun
from autopeft.tasks.cut import CutRule
from autopeft.tasks.sources.source import Sample, Source
from autopeft.tasks.splits import Splits

__all__ = ["found_again"]

_SPLITS: tuple[Split, ...] = get_args(Split)


def found_again(splits: Splits, rule: CutRule, source: Source, path: Path) -> dict[Split, tuple[Sample, ...]]:
    """The samples that the splits name, in their order.

    Raises:
        StaleRun: when the splits were cut otherwise, or samples are gone or labelled anew.
    """
    advice = "use the settings and data it began with, or start a new run folder"
    if splits.rule != rule:
        raise StaleRun(f"{path} was cut by {splits.rule}, asked is {rule}; {advice}")
    if splits.classes != source.classes:
        raise StaleRun(f"{path} has classes {', '.join(splits.classes)}, {source.title} has others; {advice}")
    known = {sample.name: sample for samples in source.parts.values() for sample in samples}
    found: dict[Split, tuple[Sample, ...]] = {}
    for split in _SPLITS:
        portion = splits[split]
        for name, label in zip(portion.names, portion.labels, strict=True):
            if name not in known or known[name].label != label:
                what = "is gone from" if name not in known else "has another label in"
                raise StaleRun(f"the image {name} of {path} {what} {source.title}; {advice}")
        found[split] = tuple(known[name] for name in portion.names)
    return found
