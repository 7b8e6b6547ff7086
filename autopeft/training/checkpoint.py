"""Adapters and interrupted trainings on disk: safetensors with JSON in the header, no pickle, written atomically."""

from __future__ import annotations

import json
import logging
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autopeft.core.codec import decode, encode
from autopeft.core.contracts import Inserted
from autopeft.errors import CorruptFile
from autopeft.store.atomic import replacing

__all__ = ["Checkpoint", "Progress", "Resumed", "load_adapter", "save_adapter", "trainable_in_file"]

_log = logging.getLogger(__name__)

_ADAPTER = "adapter/"
_STATE = ("adapter/", "buffer/", "head/")
_OPTIMIZER = "optimizer/"
_RNG = "rng/"
_TERMS = "terms/"
_MAX_HEADER = 100_000_000
"""The format's own limit, so that a damaged length does not read gigabytes."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training has come.

    Attributes:
        identity: digest of everything that decides the training's result; another identity is not resumed.
        epoch: complete epochs.
        step: steps taken in the epoch after those, 0 at an epoch's end.
        loss_sum: sum of the losses of those steps.
        seconds: wall time so far.
        losses: mean training loss of each complete epoch.
        curve: (epoch, value) pairs of the watched metric.
        metrics: metrics of the last complete epoch.
    """

    identity: str
    epoch: int
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    SCHEMA: ClassVar[str] = "autopeft.checkpoint/1"


@dataclass(frozen=True, slots=True, eq=False)
class Resumed:
    """A checkpoint read back.

    Attributes:
        progress: how far the training had come.
        state: what `Inserted.load_state` takes.
        optimizer: index of a parameter to its moments.
        rng: generator states: `cpu`, and `cuda` when trained there.
        terms: what the regularisers keep.
    """

    progress: Progress
    state: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    rng: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)


class Checkpoint:
    """Where one training keeps its progress: a single file, so that it is replaced whole or not at all.

    Args:
        folder: the folder of the file, created when first saved.
        every_seconds: least training time between two saves at an epoch's end; stopping on a signal and at a rung
            saves always.
    """

    def __init__(self, folder: Path, every_seconds: float = 10.0) -> None:
        self.folder = folder
        self.every_seconds = every_seconds

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "training.safetensors"

    def save(
        self,
        progress: Progress,
        inserted: Inserted,
        optimizer: torch.optim.Optimizer,
        rng: Mapping[str, Tensor],
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write everything that is needed to go on exactly here."""
        tensors = dict(inserted.state())
        for index, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"{_OPTIMIZER}{index}/{name}"] = value
        tensors.update({_RNG + name: value for name, value in rng.items()})
        tensors.update({_TERMS + name: value for name, value in (terms or {}).items()})
        _write(self.path, tensors, {"progress": json.dumps(encode(progress))})

    def load(self, identity: str) -> Resumed | None:
        """The progress of the training with this identity; None when there is none that can be used.

        A damaged file and one of another training (other plan, settings, data, seed or start) are reported in the log
        and ignored: training then starts from the beginning.
        """
        if not self.path.exists():
            return None
        try:
            resumed = self._read()
        except CorruptFile as error:
            _log.warning("%s; training starts from the beginning", error)
            return None
        if resumed.progress.identity != identity:
            _log.warning("the checkpoint %s is of another training; training starts from the beginning", self.path)
            return None
        return resumed

    def clear(self) -> None:
        """Remove the checkpoint; nothing happens when there is none."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> Resumed:
        tensors, metadata = _read(self.path)
        try:
            progress = decode(Progress, json.loads(metadata["progress"]), str(self.path))
            optimizer: dict[int, dict[str, Tensor]] = {}
            for name in [n for n in tensors if n.startswith(_OPTIMIZER)]:
                index, moment = name.removeprefix(_OPTIMIZER).split("/")
                optimizer.setdefault(int(index), {})[moment] = tensors[name]
        except (KeyError, ValueError) as error:
            raise CorruptFile(f"the checkpoint {self.path} does not have the expected content: {error}") from error
        return Resumed(
            progress,
            {n: t for n, t in tensors.items() if n.startswith(_STATE)},
            optimizer,
            {n.removeprefix(_RNG): t for n, t in tensors.items() if n.startswith(_RNG)},
            {n.removeprefix(_TERMS): t for n, t in tensors.items() if n.startswith(_TERMS)},
        )


def save_adapter(inserted: Inserted, path: Path) -> Path:
    """Write the trained adapters and the head, and nothing of the base model.

    Args:
        inserted: the model with adapters.
        path: the safetensors file; folders above it are created.

    Returns:
        The path.
    """
    _write(path, inserted.state(), {"format": "autopeft.adapter/1", "plan": inserted.allocation.digest})
    return path


def load_adapter(path: Path) -> dict[str, Tensor]:
    """The tensors that `save_adapter` wrote, for `Inserted.load_state`.

    Raises:
        CorruptFile: when the file is missing or damaged.
    """
    return _read(path)[0]


def trainable_in_file(path: Path) -> int:
    """Trained scalars in a saved file, the head not counted: the fourth independent count of a plan's price.

    Only the header is read; neither safetensors nor the model takes part.

    Raises:
        CorruptFile: when the file is missing or its header cannot be read.
    """
    header = _header(path)
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name.startswith(_ADAPTER))


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header: dict[str, Any] = json.loads(file.read(length).decode())
            header.pop("__metadata__", None)
            for entry in header.values():
                if not all(isinstance(d, int) and d >= 0 for d in entry["shape"]):
                    raise ValueError(f"a shape of {entry['shape']}")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path} is not a readable safetensors file: {error}") from error
    return header


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER)).decode())
        return load_file(path), dict(header.get("__metadata__", {}))
    except (OSError, struct.error, ValueError, SafetensorError) as error:
        raise CorruptFile(f"{path} is not a readable safetensors file: {error}") from error


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    # A clone per tensor: safetensors refuses tensors that share memory, and views of larger ones.
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata)
