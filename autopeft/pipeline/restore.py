"""A trained adapter back into its plan, from either of the files that hold one."""

from __future__ import annotations

from pathlib import Path

from autopeft.core.contracts import Inserted
from autopeft.export.native_file import is_native, load_native
from autopeft.training.checkpoint import load_adapter

__all__ = ["restore"]


def restore(inserted: Inserted, adapter: Path) -> None:
    """Load a trial's adapter (the state of training) or a native export's (what the methods store).

    Args:
        inserted: the plan, in its model.
        adapter: the safetensors file.

    Raises:
        CorruptFile: when the file is missing or damaged.
        StoreError: when it was exported from another plan.
        UsageError: naming the tensors that are missing, unknown or of another shape.
    """
    if is_native(adapter):
        load_native(inserted, adapter)
    else:
        inserted.load_state(load_adapter(adapter))
