"""Scorers that break one law each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import nn

from autopeft.core.contracts import Scorer, Task
from autopeft.core.scores import Scores, TensorEvidence
from autopeft.core.site import Catalog
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.magnitude import Magnitude

__all__ = ["BROKEN"]


class _Broken:
    """The gradient scorer; `spoil` turns its scores into wrong ones."""

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        return self.spoil(Gradient().score(model, catalog, task, seed))

    def spoil(self, scores: Scores) -> Scores:
        """Wrong scores."""
        return scores


class _LeavesEvaluationMode(_Broken):
    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        scores = super().score(model, catalog, task, seed)
        model.eval()
        return scores


class _CleansUpOnSuccessOnly(_Broken):
    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        flags = [p.requires_grad for p in model.parameters()]
        model.requires_grad_(True)
        scores = super().score(model, catalog, task, seed)
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
        return scores


class _PeeksAtTheOuterSplit(_Broken):
    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        next(iter(task.batches("outer")))
        return super().score(model, catalog, task, seed)


class _DrawsFromTheGlobalState(_Broken):
    def spoil(self, scores: Scores) -> Scores:
        generator = torch.Generator().set_state(torch.get_rng_state())
        noise = torch.rand((), generator=generator)
        return _edit(scores, "norm", "bias", lambda e: dataclasses.replace(e, signal=e.signal + noise))


class _DependsOnTheOrder(_Broken):
    def spoil(self, scores: Scores) -> Scores:
        first = next(name for name in scores.evidence if scores.evidence[name].get("bias") is not None)
        return _edit(scores, first, "bias", lambda e: dataclasses.replace(e, signal=e.signal + 1))


class _ForgetsAPlace(_Broken):
    def spoil(self, scores: Scores) -> Scores:
        totals = dict(scores.totals)
        del totals[max(p for p in totals if p.slot == "weight")]
        return dataclasses.replace(scores, totals=totals)


class _FlattensSignals(_Broken):
    def spoil(self, scores: Scores) -> Scores:
        name = min(n for n, e in scores.evidence.items() if e.site.kind == "conv2d")
        return _edit(scores, name, "weight", lambda e: dataclasses.replace(e, signal=e.signal.flatten(1)))


class _ForgetsToSum(_Broken):
    def spoil(self, scores: Scores) -> Scores:
        return dataclasses.replace(scores, totals={place: total / 2 for place, total in scores.totals.items()})


class _CopiesSlices(_Broken):
    def spoil(self, scores: Scores) -> Scores:
        for name, evidence in scores.evidence.items():
            if evidence.site.rows is not None:
                scores = _edit(scores, name, "weight", lambda e: dataclasses.replace(e, score=e.score.clone()))
        return scores


class _NamesNoData(_Broken):
    def spoil(self, scores: Scores) -> Scores:
        return dataclasses.replace(scores, origin=dataclasses.replace(scores.origin, data=""))


BROKEN: Mapping[str, Callable[[], Scorer]] = {
    "test_leaves_no_trace": _LeavesEvaluationMode,
    "test_leaves_no_trace_after_an_exception": _CleansUpOnSuccessOnly,
    "test_looks_at_the_inner_split_alone": _PeeksAtTheOuterSplit,
    "test_repeats": _DrawsFromTheGlobalState,
    "test_order_of_sites_does_not_matter": _DependsOnTheOrder,
    "test_every_tensor_is_answered": _ForgetsAPlace,
    "test_evidence_has_the_site_s_shape": _FlattensSignals,
    "test_scores_are_finite_and_not_negative": _ForgetsToSum,
    "test_slices_are_rows_of_the_whole": _CopiesSlices,
    "test_origin_is_true": _NamesNoData,
    "test_other_data_give_other_scores": Magnitude,
}
"""One scorer per law of `ScorerLaws` that breaks this law and no other."""


def _edit(scores: Scores, name: str, slot: str, change: Callable[[TensorEvidence], TensorEvidence]) -> Scores:
    old = scores.evidence[name]
    new = dataclasses.replace(old, slots={**old.slots, slot: change(old[slot])})
    return dataclasses.replace(scores, evidence={**scores.evidence, name: new})
