"""A PEFT folder that a production training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.export._base import BaseChoice
from autopeft.export.peft import PeftExport

__all__ = ["PeftInitExport"]


@dataclass(frozen=True, slots=True)
class PeftInitExport:
    """`PeftExport` with `trained=False`: the plan's layers and ranks, every B zero, the classifier as a warm start.

    Attributes:
        uniform_rank: as in `PeftExport`.
        base: as in `PeftExport`.
    """

    uniform_rank: bool = False
    base: BaseChoice = "auto"

    def supports(self, inserted: Inserted) -> str:
        """As `PeftExport`."""
        return self._exporter.supports(inserted)

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """As `PeftExport`."""
        return self._exporter.export(inserted, record, folder)

    @property
    def _exporter(self) -> PeftExport:
        return PeftExport(False, self.uniform_rank, self.base)
