"""Options of opening data, checked."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopeft.errors import UnknownKey, UsageError
from autopeft.tasks._guess import known_names

__all__ = ["DataOptions"]


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What a person may ask for when data is opened; None is the same as not asking.

    Attributes:
        batch_size: samples per batch.
        val_frac: see `autopeft.tasks.cut.CutRule`, as the three below.
        test_frac: share of one tree that becomes test.
        max_samples: at most this many samples of the source are used.
        max_inner: at most this many samples stay in inner.
        workers: threads that decode images.
        download: whether absent data may be fetched.
        unseal_token: who opened the test split may open it again; see `Classification`.
    """

    batch_size: int = 64
    val_frac: float | None = None
    test_frac: float | None = None
    max_samples: int | None = None
    max_inner: int | None = None
    workers: int = 0
    download: bool = False
    unseal_token: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise UsageError(f"workers must be at least 1, or 0 for one per free core, got {self.workers}")

    @property
    def threads(self) -> int:
        """Threads that decode: as asked, else one per core this process may run on, at most 8."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or min(8, cores)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> DataOptions:
        """Checked options.

        Raises:
            UnknownKey: for an option that nobody knows, with a guess.
            UsageError: for a value of the wrong type or range.
        """
        hints = typing.get_type_hints(cls)
        known = [f.name for f in dataclasses.fields(cls)]
        values = {}
        for name, value in options.items():
            if name not in known:
                raise UnknownKey(f"unknown data option {name!r}. {known_names(name, known)}")
            if value is None:
                continue
            kinds = typing.get_args(hints[name]) or (hints[name],)
            if float in kinds and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = next(kind.__name__ for kind in kinds if kind is not type(None))
                raise UsageError(f"the data option {name} must be of type {wanted}, got {value!r}")
            values[name] = value
        return cls(**values)
