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
        correct: per sample of the measured split whether it was classified correctly; empty when it did not finish.
        sample_epochs: samples that training has seen.
        key: what the training was.
    """

    outcome: Outcome
    correct: np.ndarray[Any, np.dtype[np.bool_]]
    sample_epochs: int
    key: str = ""


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
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(data["correct"]), dtype=np.uint8), count=data["n"])
            return Entry(decode(Outcome, data["outcome"], str(path)), bits.astype(bool), data["sample_epochs"], key)
        except (CorruptFile, KeyError, ValueError, TypeError):
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry."""
        self._folder.mkdir(parents=True, exist_ok=True)
        correct = np.packbits(entry.correct.astype(np.uint8)).tobytes().hex()
        data = {
            "outcome": encode(entry.outcome),
            "correct": correct,
            "n": len(entry.correct),
            "sample_epochs": entry.sample_epochs,
        }
        write_json(self._folder / f"{key}.json", data)

    def sample_epochs(self, split: Split) -> int:
        """Samples that the trainings that were measured on this split have seen."""
        found = (self.get(path.stem) for path in self._folder.glob("*.json"))
        return sum(entry.sample_epochs for entry in found if entry is not None and entry.outcome.split == split)
