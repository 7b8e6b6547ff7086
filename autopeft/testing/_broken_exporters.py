"""One exporter per law that breaks this law and no other; each is the timm export with one fault."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from autopeft.core.contracts import Exporter, Inserted
from autopeft.core.record import Record
from autopeft.export._model import states_of
from autopeft.export._timm_folder import write_timm_folder
from autopeft.export.timm import TimmExport

__all__ = ["BROKEN"]


@dataclass(frozen=True, slots=True)
class _Forgetful(TimmExport):
    """Writes the base: the adapters are lost."""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        return write_timm_folder(inserted.model, states_of(inserted).base, record, folder)


@dataclass(frozen=True, slots=True)
class _Meddling(TimmExport):
    """Leaves the borrowed model in training mode."""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        paths = TimmExport.export(self, inserted, record, folder)
        inserted.model.train()
        return paths


@dataclass(frozen=True, slots=True)
class _Littering(TimmExport):
    """Leaves a file behind that it does not tell of."""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        paths = TimmExport.export(self, inserted, record, folder)
        (folder / "model.safetensors.tmp").write_text("left over")
        return paths


@dataclass(frozen=True, slots=True)
class _Stamping(TimmExport):
    """Writes the time into the card."""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        paths = TimmExport.export(self, inserted, record, folder)
        with paths[-1].open("a") as card:
            card.write(f"\nWritten at {time.time_ns()}.\n")
        return paths


@dataclass(frozen=True, slots=True)
class _Pretending(TimmExport):
    """Claims every plan and leaves out what it cannot hold."""

    def supports(self, inserted: Inserted) -> str:
        return ""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        if not TimmExport.supports(self, inserted):
            return TimmExport.export(self, inserted, record, folder)
        plain = {n: t for n, t in inserted.model.state_dict().items() if "autopeft" not in n}
        return write_timm_folder(inserted.model, plain, record, folder)


BROKEN: dict[str, Exporter] = {
    "test_reloaded_gives_the_same_logits": _Forgetful(),
    "test_the_borrowed_model_is_left_alone": _Meddling(),
    "test_every_written_file_is_returned": _Littering(),
    "test_two_exports_are_the_same_bytes": _Stamping(),
    "test_what_it_cannot_hold_is_refused": _Pretending(),
}
"""Name of a law to an exporter that breaks it."""
