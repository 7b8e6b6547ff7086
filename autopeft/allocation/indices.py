"""Which entries the sparse options of a plan train, and between which bases its cores lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autopeft.core.allocation import Allocation
from autopeft.core.contracts import BasedMethod
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from autopeft.core.contracts import Method
    from autopeft.core.menu import Option
    from autopeft.core.scores import Scores
    from autopeft.core.site import Site

__all__ = ["attach_indices"]


def attach_indices(
    allocation: Allocation,
    methods: Mapping[str, Method],
    scores: Scores,
    sites: Mapping[str, Site] | None = None,
) -> Allocation:
    """The same plan with `Option.indices` of chosen entries and `Option.bases` from data filled in.

    Options that have theirs already, such as SPT's, keep them.

    Args:
        allocation: the plan.
        methods: method key to method.
        scores: the evidence that entries and bases are chosen by.
        sites: the groups among the plan's sites, by name.

    Raises:
        UsageError: for an option of an unknown method, a sparse option at a site without evidence, or bases that
            nobody has measured.
    """
    return Allocation(
        tuple(_with_indices(option, methods, scores, sites or {}) for option in allocation.options),
        allocation.budget,
        allocation.provenance,
    )


def _with_indices(option: Option, methods: Mapping[str, Method], scores: Scores, sites: Mapping[str, Site]) -> Option:
    if option.method not in methods:
        raise UsageError(
            f"the plan uses method {option.method!r} at {option.site}, which the study does not have; "
            f"it has {', '.join(methods) or 'none'}"
        )
    method = methods[option.method]
    if option.indices is not None:
        return option
    site = sites.get(option.site)
    evidence = scores.about(site) if site is not None else scores.evidence.get(option.site)
    if evidence is not None:
        indices = method.select(evidence.site, evidence, option.size)
        bases = option.bases
        if bases is None and isinstance(method, BasedMethod):
            bases = method.bases(evidence.site, evidence, option.size, indices)
        return dataclasses.replace(option, indices=indices, bases=bases)
    if method.family != "entries":
        return option
    raise UsageError(
        f"the scorer kept nothing for {option.site}, so the {option.size:,} entries of {option.key} cannot be "
        "chosen; score this model first"
    )
