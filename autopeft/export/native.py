"""The trained tensors alone, for autopeft itself: any plan, however mixed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopeft.core.codec import encode
from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.export.bases_file import basis_digests, write_bases
from autopeft.export.native_file import full_names, write_native
from autopeft.store.atomic import write_json

__all__ = ["NativeExport"]


@dataclass(frozen=True, slots=True)
class NativeExport:
    """`adapter.safetensors` and `metadata.json`; together with the run's `plan.json` they rebuild the model.

    Bases that cores compute again from the weights are not in the adapter's file. `metadata.json` has their digests,
    and `bases.safetensors` a copy, which is only read where the digests differ on loading.

    The adapter's file holds what the methods store: packed codes where training keeps floats. Only autopeft loads it
    (`autopeft eval FOLDER`), so it is the one format that represents every plan.
    """

    SCHEMA = "autopeft.native/2"

    def supports(self, inserted: Inserted) -> str:
        """Every plan."""
        return ""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the folder; the plan is written by whoever knows its settings."""
        allocation = inserted.allocation
        adapter = write_native(inserted, folder / "adapter.safetensors")
        bases = write_bases(inserted, folder)
        metadata: dict[str, Any] = {
            "schema": self.SCHEMA,
            "plan": allocation.digest,
            "trainable": allocation.trainable,
            "spent": allocation.spent,
            "stored": allocation.cost.stored,
            "bytes": allocation.cost.of("bytes"),
            "tensors": full_names(inserted),
            "bases": basis_digests(inserted),
            "model": encode(record.model),
            "data": encode(record.data),
            "budget": encode(record.budget),
            "environment": encode(record.environment),
        }
        path = folder / "metadata.json"
        write_json(path, metadata)
        return adapter, path, *bases
