from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from autopeft.allocation.gain import GainPolicy, build_menu
from autopeft.allocation.indices import attach_indices
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.errors import UsageError


def plan(vit: Catalog, methods: Mapping[str, Method], scores: Scores) -> Allocation:
    menu = build_menu(vit, methods, scores, GainPolicy(methods={"vector": 0.0}), budget=Budget(120))
    return Knapsack().allocate(menu, Budget(120))


def test_sparse_options_get_the_best_entries_and_nothing_else_changes(
    vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores]
) -> None:
    scores = scores_of(vit.sites)
    bare = plan(vit, methods, scores)
    full = attach_indices(bare, methods, scores)
    sparse = [o for o in full if o.method in ("sparse", "sparse_bias")]
    assert sparse
    for option in sparse:
        assert option.indices is not None
        slot = option.places[0].slot
        score = scores.evidence[option.site][slot].score.flatten()
        assert set(option.indices.values.tolist()) == set(torch.topk(score, option.size).indices.tolist())
    assert [(o.site, o.method, o.size, o.gain) for o in full] == [(o.site, o.method, o.size, o.gain) for o in bare]
    assert full.provenance == bare.provenance
    assert all(o.indices is None for o in full if o not in sparse)
    assert attach_indices(full, methods, scores) == full


def test_what_cannot_be_chosen_is_named(
    vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores]
) -> None:
    scores = scores_of(vit.sites)
    bare = plan(vit, methods, scores)
    with pytest.raises(UsageError, match="score this model first"):
        attach_indices(bare, methods, Scores(scores.origin, {}, {}))
    with pytest.raises(UsageError, match="which the study does not have"):
        attach_indices(bare, {}, scores)
