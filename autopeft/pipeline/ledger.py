"""Finished trainings by what they were: nothing is trained twice, also after a crash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.core.codec import decode, encode
from autopeft.core.outcome import Outcome, Split
from autopeft.errors import CorruptFile
from autopeft.store.atomic import read_json, write_json

__all__ = ["Entry", "Ledger", "training_key"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One finished training.

    Attributes:
        outcome: what came of it.
        merits: per sample of the measured split whether it was classified correctly, or how well it is done; empty
            when it did not finish.
        sample_epochs: samples that training has seen.
        key: what the training was.
        shards: mean loss per shard of the measured split, see `autopeft.search.race.shard_means`; empty when it did not
            finish or the task has no loss per sample.
        stage: what it was for: `baselines`, `default`, `race`, `search`, `failed` or `finish`.
        passes: what it cost with its evaluations, see `autopeft.pipeline.costs`.
    """

    outcome: Outcome
    merits: np.ndarray[Any, np.dtype[np.bool_]] | np.ndarray[Any, np.dtype[np.float64]]
    sample_epochs: int
    key: str = ""
    shards: tuple[float, ...] = ()
    stage: str = ""
    passes: float = 0.0


def training_key(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of everything that decides the result of a training."""
    text = json.dumps(encode(facts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """One JSON file per training in a folder of the run.

    Args:
        folder: where the files lie; created with the first entry.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Entry | None:
        """The entry of a key; None when there is none or its file is damaged, so that it is trained again."""
        path = self._folder / f"{key}.json"
        if not path.exists():
            return None
        try:
            data = read_json(path)
            return Entry(
                decode(Outcome, data["outcome"], str(path)),
                _read(data),
                data["sample_epochs"],
                key,
                tuple(data.get("shards", ())),
                data.get("stage", ""),
                data.get("passes", 0.0),
            )
        except (CorruptFile, KeyError, ValueError, TypeError):
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry."""
        self._folder.mkdir(parents=True, exist_ok=True)
        data = {
            "outcome": encode(entry.outcome),
            **_written(entry.merits),
            "n": len(entry.merits),
            "sample_epochs": entry.sample_epochs,
            "shards": list(entry.shards),
            "stage": entry.stage,
            "passes": entry.passes,
        }
        write_json(self._folder / f"{key}.json", data)

    def sample_epochs(self, split: Split) -> int:
        """Samples that the trainings that were measured on this split have seen."""
        found = (self.get(path.stem) for path in self._folder.glob("*.json"))
        return sum(entry.sample_epochs for entry in found if entry is not None and entry.outcome.split == split)

    def passes(self) -> dict[str, float]:
        """Passes per stage of the trainings that are kept; what a process lost when it died is not."""
        found: dict[str, float] = {}
        for path in sorted(self._folder.glob("*.json")):
            entry = self.get(path.stem)
            if entry is not None:
                found[entry.stage] = found.get(entry.stage, 0.0) + entry.passes
        return found


def _written(merits: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Hits and misses as packed bits, other merits as they are."""
    if merits.dtype == np.bool_:
        return {"correct": np.packbits(merits.astype(np.uint8)).tobytes().hex()}
    return {"merits": merits.astype(np.float64).tolist()}


def _read(data: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    if "merits" in data:
        return np.asarray(data["merits"], dtype=np.float64)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(data["correct"]), dtype=np.uint8), count=data["n"])
    return bits.astype(bool)
