"""A compressed change and what is needed to apply it, as a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.export._base import BaseChoice, base_expression, includes_base, write_base
from autopeft.export._card import card
from autopeft.export._files import write_tensors
from autopeft.export._model import States, not_timm, states_of
from autopeft.export.delta import changes_of
from autopeft.store.atomic import write_text

__all__ = ["Change", "change_of", "write_compressed", "write_parts"]

_FILE = "compressed.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What training has changed in a model's own tensors.

    Attributes:
        base: state dict of the model as it was borrowed, with the trained classifier, on the CPU.
        parts: the change, as `delta.safetensors` holds it.
        classifier: names of the classifier's tensors.
    """

    base: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]
    classifier: tuple[str, ...]


def change_of(inserted: Inserted) -> Change:
    """The change that a trained plan is.

    Raises:
        ExportError: naming the options that cannot be merged.
    """
    states = states_of(inserted)
    return Change(states.base, changes_of(inserted, states), states.classifier)


def write_parts(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write tensors and texts as every format does.

    Returns:
        The size of the file in bytes.
    """
    return write_tensors(path, tensors, metadata).stat().st_size


def write_compressed(
    inserted: Inserted,
    record: Record,
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    change: Change | None,
    loader: tuple[str, str],
    sections: Sequence[tuple[str, str]],
    base: BaseChoice = "auto",
) -> bool:
    """Write `compressed.safetensors`, its loader, `README.md`, and the base model where it cannot be fetched by name.

    Args:
        inserted: the plan.
        record: where it came from.
        folder: where to.
        tensors: content of the file.
        metadata: texts of its header.
        change: the change that was compressed; None when the adapters' own tensors were, which autopeft alone can use.
        loader: name and text of the loader.
        sections: heading and text of what else the README tells.
        base: whether the base model is written into `base/`.

    Returns:
        Whether timm can rebuild the base model, so that the folder can be applied without autopeft.
    """
    write_tensors(folder / _FILE, tensors, metadata)
    name, text = loader
    write_text(folder / name, text)
    stands_alone = change is not None and not not_timm(inserted.model)
    if change is not None and stands_alone and includes_base(base, record):
        write_base(inserted, States(change.base, {}, change.classifier), record, folder / "base")
    if change is None:
        use = _AS_ADAPTER
    else:
        build = base_expression(base, inserted, record) if stands_alone else "..."
        lines = ["import timm", ""] if stands_alone else []
        use = "\n".join([*lines, _IMPORT, "", f"model = {build}", _APPLY, "model.eval()"])
    what = "adapters" if change is None else "weight change"
    page = card(
        f"Compressed {what} for {record.model.get('architecture') or 'a model'}, trained with autopeft",
        inserted,
        record,
        library="timm",
        sections=[("Apply", f"Run it in this folder.\n\n```python\n{use}\n```"), *sections],
        adapter=True,
    )
    write_text(folder / "README.md", page.replace("FOLDER/base", "base"))
    return stands_alone


_IMPORT = "from load_compressed import apply_compressed"
_APPLY = f'apply_compressed(model, "{_FILE}")'
_AS_ADAPTER = f"""from load_compressed import read_compressed
from safetensors.torch import save_file

# These are the adapters' own tensors: only autopeft runs it. Beside plan.json, a trained plan again:
save_file(read_compressed("{_FILE}"), "adapter.safetensors")"""
