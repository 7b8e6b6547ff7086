"""The bases that a plan computes again from the weights, kept beside its adapter in case another machine's differ."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autopeft.core.contracts import Inserted
from autopeft.errors import CorruptFile, StoreError
from autopeft.export._files import write_tensors
from autopeft.methods.base import Part

__all__ = ["BASES_FILE", "basis_digests", "recomputed_bases", "settle_bases", "write_bases"]

BASES_FILE = "bases.safetensors"
"""Name of the file, in the folder of an export. It may be deleted where the digests are known to agree."""

_log = logging.getLogger("autopeft.export")


def recomputed_bases(inserted: Inserted) -> dict[str, Tensor]:
    """The buffers themselves, by `SITE/METHOD/NAME`, of every part that says that it computes them again."""
    found: dict[str, Tensor] = {}
    for key, part in inserted.named_adapters().items():
        for path, module in part.named_modules():
            for name in sorted(module.recomputed) if isinstance(module, Part) else ():
                found[f"{key}/{path}.{name}" if path else f"{key}/{name}"] = module.get_buffer(name)
    return found


def basis_digests(inserted: Inserted) -> dict[str, str]:
    """sha256 of the float32 values of every recomputed basis, by name."""
    return {name: _digest(tensor) for name, tensor in recomputed_bases(inserted).items()}


def write_bases(inserted: Inserted, folder: Path) -> tuple[Path, ...]:
    """Write the recomputed bases of a plan into a folder; nothing when it has none."""
    found = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in recomputed_bases(inserted).items()}
    return (write_tensors(folder / BASES_FILE, found),) if found else ()


def settle_bases(inserted: Inserted, digests: Mapping[str, str], folder: Path) -> None:
    """Have the plan's bases be those that it was trained between.

    Singular vectors are unique up to rounding, and up to a rotation where singular values coincide, so that another
    version of LAPACK may give others. A trained core means nothing between them. Where a digest differs, the stored
    factors take the place of all bases computed here.

    Args:
        inserted: the plan in its model, which holds the bases computed here; they are written to.
        digests: what `basis_digests` gave when the plan was exported.
        folder: where `bases.safetensors` lies, if it was kept.

    Raises:
        StoreError: when they differ and the stored factors are not there.
        CorruptFile: when the stored factors are not what the digests say.
    """
    mine = recomputed_bases(inserted)
    differing = sorted(name for name in digests if name not in mine or _digest(mine[name]) != digests[name])
    if not differing:
        return
    path, number = folder / BASES_FILE, f"{len(differing)} of {len(digests)}"
    if not path.is_file():
        raise StoreError(
            f"{number} bases come out differently than where the adapter was trained ({differing[0]} first), which "
            f"happens with another torch or LAPACK, or with other base weights; the stored ones are needed, "
            f"and {path} is missing. Copy it from the export, or export as timm, delta or peft, which need no bases"
        )
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptFile(f"{path} is not a readable safetensors file: {error}") from error
    for name, digest in digests.items():
        if name not in stored or name not in mine or _digest(stored[name]) != digest:
            raise CorruptFile(f"{path} does not hold the basis {name} that the adapter was exported with")
    worst = max(float((mine[name].cpu().float() - stored[name]).abs().max()) for name in differing)
    _log.warning(
        "%s bases come out differently here than where the adapter was trained (by up to %.1e, %s first); the stored "
        "ones in %s are used",
        number,
        worst,
        differing[0],
        path,
    )
    with torch.no_grad():
        for name in digests:
            mine[name].copy_(stored[name])


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().astype("<f4").tobytes()).hexdigest()
