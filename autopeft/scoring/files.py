"""Scores as two files: `scores.json` for the numbers, `scores.safetensors` for the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from autopeft.core.codec import decode, encode
from autopeft.core.scores import Evidence, ScoreOrigin, Scores, TensorEvidence
from autopeft.core.site import Catalog, Place, Site
from autopeft.errors import CorruptFile, StoreError
from autopeft.scoring._branches import of_branches
from autopeft.store.atomic import read_json, write_bytes, write_json

__all__ = ["load_scores", "save_scores"]

_NUMBERS, _TENSORS = "scores.json", "scores.safetensors"
_FIELDS = ("value", "signal", "score", "half_a", "half_c", "square", "memory")


@dataclass(frozen=True, slots=True)
class _Total:
    site: str
    slot: str
    score: float


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What `scores.json` holds.

    Attributes:
        origin: what the scores were made from.
        totals: the total of every place.
        evidence: site to slot to the fields kept; `FIELD` for a tensor of the file, `FIELD@` for a view of the whole.
        sha256: of `scores.safetensors`.
    """

    origin: ScoreOrigin
    totals: tuple[_Total, ...]
    evidence: Mapping[str, Mapping[str, tuple[str, ...]]]
    sha256: str

    SCHEMA: ClassVar[str] = Scores.SCHEMA


def save_scores(scores: Scores, folder: Path) -> None:
    """Write scores into a folder, exactly; slices that are views of their whole are not written twice.

    The tensors are replaced before the numbers that name their digest, so that a reader never takes old numbers for
    new tensors.

    Args:
        scores: the scores.
        folder: where `scores.json` and `scores.safetensors` go; made when missing.

    Raises:
        StoreError: when the folder cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    kept: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, evidence in scores.evidence.items():
        if evidence.site.kind == "residual":
            continue
        whole = scores.evidence.get(evidence.site.parent)
        for slot, fields in evidence.slots.items():
            marks = []
            for field, tensor in _fields(fields):
                if _is_view(evidence.site, tensor, whole, slot, field):
                    marks.append(f"{field}@")
                else:
                    marks.append(field)
                    tensors[_key(name, slot, field)] = tensor.detach().cpu().contiguous().clone()
            kept.setdefault(name, {})[slot] = tuple(marks)
    data = save(tensors)
    totals = tuple(_Total(place.site, place.slot, total) for place, total in scores.totals.items())
    numbers = _Numbers(scores.origin, totals, kept, hashlib.sha256(data).hexdigest())
    write_bytes(folder / _TENSORS, data)
    write_json(folder / _NUMBERS, encode(numbers))


def load_scores(folder: Path, catalog: Catalog) -> Scores:
    """Read scores back, bit for bit.

    Args:
        folder: what `save_scores` was given.
        catalog: the catalogue that the scores were made for.

    Raises:
        StoreError: when there are no scores in the folder.
        CorruptFile: naming the file, when its content is not what was written.
        UsageError: when the scores were made for another catalogue.
    """
    numbers = decode(_Numbers, read_json(folder / _NUMBERS), str(folder / _NUMBERS))
    Scores(numbers.origin, {}).check(ScoreOrigin("", 0, catalog.fingerprint))
    tensors = _read(folder / _TENSORS, numbers.sha256)
    evidence: dict[str, Evidence] = {}
    try:
        for name, slots in numbers.evidence.items():
            site = catalog[name]
            found = {slot: _restore(site, slot, marks, tensors, evidence) for slot, marks in slots.items()}
            evidence[name] = Evidence(site, found)
        totals = {Place(row.site, row.slot): row.score for row in numbers.totals}  # type: ignore[arg-type]  # checked below
        _check_places(totals, catalog)
        return Scores(numbers.origin, totals, evidence | of_branches(catalog, evidence))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{folder / _NUMBERS} does not fit {folder / _TENSORS}: {error}; delete both") from error


def _fields(fields: TensorEvidence) -> Iterator[tuple[str, Tensor]]:
    for name in _FIELDS:
        tensor = getattr(fields, name)
        if tensor is not None:
            yield name, tensor


def _key(site: str, slot: str, field: str) -> str:
    return f"{site}/{slot}/{field}"


def _is_view(site: Site, tensor: Tensor, whole: Evidence | None, slot: str, field: str) -> bool:
    """Whether a slice's tensor is just the rows of its whole's."""
    fields = whole.get(slot) if whole is not None else None
    full = getattr(fields, field) if fields is not None else None
    if full is None or site.rows is None:
        return False
    rows = full[site.rows[0] : site.rows[1]]
    return bool(
        rows.data_ptr() == tensor.data_ptr() and rows.shape == tensor.shape and rows.stride() == tensor.stride()
    )


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptFile(f"{path} has sha256 {found[:12]}, {_NUMBERS} beside it expects {sha256[:12]}; delete both")
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise CorruptFile(f"{path} is not in safetensors format: {error}; delete it") from error
    return tensors


def _restore(
    site: Site, slot: str, marks: tuple[str, ...], tensors: Mapping[str, Tensor], evidence: Mapping[str, Evidence]
) -> TensorEvidence:
    found: dict[str, Any] = {}
    for mark in marks:
        field = mark.removesuffix("@")
        if field == mark:
            found[field] = tensors[_key(site.name, slot, field)]
        else:
            if site.rows is None:
                raise ValueError(f"{site.name} is no slice")
            found[field] = getattr(evidence[site.parent].slots[slot], field)[site.rows[0] : site.rows[1]]
    return TensorEvidence(**found)


def _check_places(totals: Mapping[Place, float], catalog: Catalog) -> None:
    for place in totals:
        if place.slot not in catalog[place.site].slots:
            raise ValueError(f"the catalogue has no place {place}")
