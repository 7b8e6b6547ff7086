"""The exported adapter file: what every method stores, in as few bytes as a named format takes."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from autopeft.core.contracts import Inserted
from autopeft.errors import CorruptFile, StoreError
from autopeft.export._files import write_tensors
from autopeft.export.bases_file import settle_bases
from autopeft.store.atomic import read_json

__all__ = ["FORMAT", "full_names", "is_native", "load_native", "write_native"]

FORMAT = "autopeft.native/2"
"""What the header of such a file says."""


def full_names(inserted: Inserted) -> dict[str, str]:
    """Name in the file to name in `Inserted.stored`, in the plan's order.

    `o12.0` is the first tensor, by name, of the plan's option number 12. Full names would often take more bytes than
    the tensors of small options, and how many would depend on the model's taste in names. The classifier and what
    belongs to no option keep their names.
    """
    left = list(inserted.stored())
    found: dict[str, str] = {}
    for number, option in enumerate(inserted.allocation):
        own = sorted(name for name in left if name.partition("/")[2].startswith(f"{option.key}/"))
        found |= {f"o{number}.{index}": name for index, name in enumerate(own)}
        left = [name for name in left if name not in own]
    return found | {name: name for name in left}


def write_native(inserted: Inserted, path: Path) -> Path:
    """Write what the plan's methods store, and the classifier.

    Beside the classifier the file takes no more bytes than the plan costs in `bytes`.

    Args:
        inserted: the trained plan.
        path: the safetensors file; folders above it are made.
    """
    stored = inserted.stored()
    tensors = {short: stored[name] for short, name in full_names(inserted).items()}
    return write_tensors(path, tensors, {"format": FORMAT, "plan": inserted.allocation.digest})


def is_native(path: Path) -> bool:
    """Whether `write_native` wrote the file; False for a trial's adapter, which holds the state of training.

    Raises:
        CorruptFile: when the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError) as error:
        raise CorruptFile(f"{path} is not a readable safetensors file: {error}") from error


def load_native(inserted: Inserted, path: Path) -> None:
    """Put what `write_native` wrote back into the same plan, between the bases that it was trained between.

    Raises:
        CorruptFile: when the file, or a basis stored beside it that is needed, is missing, damaged or of another
            format.
        StoreError: when it belongs to another plan, or bases come out differently and are not stored beside it.
        UsageError: naming the tensors that are missing, unknown or of another shape.
    """
    if not is_native(path):
        raise CorruptFile(f"{path} is not an exported adapter of format {FORMAT!r}")
    with safe_open(path, framework="pt") as file:
        plan = file.metadata()["plan"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if plan != inserted.allocation.digest:
        raise StoreError(
            f"{path} was exported from the plan {plan}, this one is {inserted.allocation.digest}; "
            f"load it with the plan.json beside it"
        )
    names = full_names(inserted)
    inserted.load_stored({names.get(short, short): tensor for short, tensor in tensors.items()})
    metadata = path.with_name("metadata.json")
    if metadata.is_file():
        settle_bases(inserted, read_json(metadata).get("bases", {}), path.parent)
