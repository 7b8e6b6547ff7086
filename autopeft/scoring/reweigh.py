"""Fisher scores under another preconditioner, without another pass over the data."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from autopeft.core.scores import Scores, TensorEvidence
from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.scoring.fisher import Fisher

__all__ = ["reweighed"]


def reweighed(scores: Scores, catalog: Catalog, before: Fisher, after: Fisher) -> Scores:
    """The scores that `after` would have given on the same samples, up to one factor for the whole model.

    The signal of `Fisher` is `g / (F + damping * mean(F)) ** (power / 2)`, and the second moment F is part of the
    evidence, so that another power is a product entry by entry:

        signal * (F + damping * mean(F)) ** ((before.power - after.power) / 2).

    In mode `per_batch` F is kept without the factor of the batch size; the factor is the same for every entry, and
    gains are shares of the model's energy.

    Args:
        scores: what `before` measured.
        catalog: the catalogue they were measured on.
        before: the scorer of `scores`.
        after: the same scorer with another power.

    Raises:
        UsageError: when the scorers differ in more than their power, or the second moment was not kept.
    """
    if dataclasses.replace(after, power=before.power) != before:
        raise UsageError(f"scores of {before} cannot be re-weighted to {after}: only the power may differ")
    exponent = (before.power - after.power) / 2
    whole = {site.name for site in catalog.candidates("whole")}
    means = {
        outputs: _mean(
            [
                _square(tensor, name)
                for name, item in scores.evidence.items()
                if name in whole
                for slot, tensor in item.slots.items()
                if (slot == "output") == outputs and (not outputs or item.site.kind == "block")
            ]
        )
        for outputs in (False, True)
    }

    def one(name: str, slot: str, known: TensorEvidence) -> TensorEvidence:
        factor = (_square(known, name) + before.damping * means[slot == "output"]).pow(exponent)
        # Where no gradient of the whole part is above 0, neither is a signal.
        factor = factor.nan_to_num(posinf=0.0)
        signal = known.signal * factor
        return dataclasses.replace(
            known,
            signal=signal,
            score=signal.square(),
            half_a=None if known.half_a is None else known.half_a * factor,
            half_c=None if known.half_c is None else known.half_c * factor,
        )

    evidence = {
        name: dataclasses.replace(item, slots={slot: one(name, slot, known) for slot, known in item.slots.items()})
        for name, item in scores.evidence.items()
    }
    totals = dict(scores.totals)
    for place in totals:
        known = evidence[place.site].get(place.slot) if place.site in evidence else None
        if known is not None:
            totals[place] = float(known.score.sum(dtype=known.score.dtype))
    return Scores(dataclasses.replace(scores.origin, scorer=repr(after)), totals, evidence)


def _square(known: TensorEvidence, name: str) -> Tensor:
    if known.square is None:
        raise UsageError(f"the scores of {name} keep no second moment, so that they cannot be re-weighted")
    return known.square


def _mean(tensors: list[Tensor]) -> float:
    entries = sum(t.numel() for t in tensors)
    return sum(float(t.double().sum()) for t in tensors) / max(entries, 1)
