"""Bases that take a pass over the data, or a short training, of their own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import BasedMethod, Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, Scores
from autopeft.errors import UsageError
from autopeft.methods.base import Adapter
from autopeft.methods.full import Full
from autopeft.scoring.activation import activation_bases
from autopeft.scoring.aligned import aligned_bases
from autopeft.scoring.gradient import Gradient
from autopeft.store.atomic import write_bytes
from autopeft.training.loop import fit
from autopeft.training.settings import LearningRates, TrainSettings
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.pipeline.prepare import Prepared

__all__ = ["TRAJECTORY_SHARE", "BasisSet", "asked_bases", "measure_bases", "short_schedule", "with_bases"]

_log = logging.getLogger("autopeft.pipeline")

TRAJECTORY_SHARE = 0.05
"""Share of the study's schedule that the throw-away full fine-tuning takes."""

_FULL_RATE = 1e-3
"""Peak rate of that fine-tuning at width 128, the best of `studies/bundled_gap`; rates of other widths follow from the
study's rule."""


@dataclass(frozen=True, eq=False)
class BasisSet:
    """Measured bases of one name.

    Attributes:
        pairs: name of a matrix to (out_features, n) and (in_features, n), orthonormal, float32 on the CPU.
        samples: samples seen, each as often as it was seen; part of the cost of a search.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    samples: int


def asked_bases(methods: Mapping[str, Method]) -> dict[str, int]:
    """Names of the measured bases that methods ask for, and the most directions that any of them wants."""
    found: dict[str, int] = {}
    for method in methods.values():
        for name, rank in (method.measured if isinstance(method, BasedMethod) else {}).items():
            found[name] = max(rank, found.get(name, 0))
    return found


def measure_bases(prepared: Prepared, name: str, rank: int) -> BasisSet:
    """Bases by name: read from the run folder when they belong to this model, head, data and settings, else measured.

    Raises:
        UsageError: for a name nobody knows.
        TrainingFailed: when the short fine-tuning diverges.
    """
    if name not in _MAKERS:
        raise UsageError(f"nobody knows how to measure the bases {name!r}; known are {', '.join(_MAKERS)}")
    study = prepared.study
    facts = [name, rank, study.seed, repr(prepared.origin), repr(study.train) if name == "trajectory" else ""]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = None if prepared.folder is None else prepared.folder / f"bases_{name}.safetensors"
    if path is not None and (kept := _read(path, key)) is not None:
        return kept
    start = time.perf_counter()
    with thread_count(prepared.threads):
        found = _MAKERS[name](prepared, rank)
    prepared.seconds[f"bases {name}"] = time.perf_counter() - start
    if path is not None:
        tensors = {f"{side}/{site}": pair[i] for site, pair in found.pairs.items() for i, side in enumerate(_SIDES)}
        write_bytes(path, save(tensors, {"key": key, "samples": str(found.samples)}))
    return found


def with_bases(scores: Scores, name: str, found: BasisSet) -> Scores:
    """The same scores with the bases of every matrix among its evidence."""
    evidence = dict(scores.evidence)
    for site, pair in found.pairs.items():
        known = evidence.get(site)
        if known is None or "weight" not in known.slots:
            continue
        weight = known.slots["weight"]
        weight = dataclasses.replace(weight, bases={**weight.bases, name: pair})
        evidence[site] = Evidence(known.site, {**known.slots, "weight": weight}, known.members)
    return Scores(scores.origin, scores.totals, evidence)


def short_schedule(settings: TrainSettings) -> TrainSettings:
    """The schedule of the throw-away fine-tuning: complete, but over `TRAJECTORY_SHARE` of the study's samples."""
    passes = TRAJECTORY_SHARE * settings.epochs * settings.data_fraction
    whole = max(1, round(passes))
    return dataclasses.replace(
        settings,
        epochs=whole,
        data_fraction=min(1.0, passes / whole),
        lr=dataclasses.replace(LearningRates(head=settings.lr.head), entries=_FULL_RATE),
        lr_scale=1.0,
    )


def _samples(prepared: Prepared) -> Gradient:
    """The samples that scores are made from, where the scorer says."""
    settings = getattr(prepared.study.scorer, "gradient", prepared.study.scorer)
    return settings if isinstance(settings, Gradient) else Gradient()


def _activation(prepared: Prepared, rank: int) -> BasisSet:
    model, catalog, task = prepared.model, prepared.catalog, prepared.task
    return BasisSet(*activation_bases(model, catalog, task, _samples(prepared), prepared.study.seed, rank))


def _aligned(prepared: Prepared, rank: int) -> BasisSet:
    model, catalog, task = prepared.model, prepared.catalog, prepared.task
    return BasisSet(*aligned_bases(model, catalog, task, _samples(prepared), prepared.study.seed, rank))


def _trajectory(prepared: Prepared, rank: int) -> BasisSet:
    method, catalog = Full(), prepared.catalog
    sites = [site for site in catalog.offered("whole") if method.slots(site)]
    options = tuple(Option(s.name, "full", 1, method.cost(s, 1), 0.0, places_of(catalog, method, s)) for s in sites)
    allocation = Allocation(options, Budget(sum(option.cost.trainable for option in options)))
    methods: dict[str, Method] = {"full": method}
    seed = prepared.study.seed
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    with Native().insert(prepared.model, catalog, allocation, methods, seed=seed, head=prepared.head) as inserted:
        trained = fit(
            inserted,
            prepared.task,
            short_schedule(prepared.study.train),
            methods=methods,
            seed=seed,
            device=prepared.device,
            watch=None,
        )
        for part in inserted.named_adapters().values():
            assert isinstance(part, Adapter)
            if part.site.is_matrix:
                change = part.delta()["weight"].detach()
                for site in (part.site, *(catalog[name] for name in part.site.parts)):
                    start, stop = site.rows or (0, len(change))
                    pairs[site.name] = _singular(change[start:stop], rank)
    return BasisSet(pairs, trained.sample_epochs)


_MAKERS: Mapping[str, Callable[[Prepared, int], BasisSet]] = MappingProxyType(
    {"activation": _activation, "aligned": _aligned, "trajectory": _trajectory}
)
_SIDES = ("left", "right")


def _singular(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(change.flatten(1).cpu().double(), full_matrices=False)
    return u[:, :rank].float().contiguous(), vh[:rank].T.float().contiguous()


def _read(path: Path, key: str) -> BasisSet | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("key") != key:
                return None
            names = [name.removeprefix("left/") for name in file.keys() if name.startswith("left/")]  # noqa: SIM118 - no mapping
            pairs = {name: (file.get_tensor(f"left/{name}"), file.get_tensor(f"right/{name}")) for name in names}
            return BasisSet(pairs, int(facts["samples"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        _log.warning("bases in %s are measured again: %s", path, error)
        return None
