"""What a search costs, in passes of one sample, and in units of one full training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autopeft.pipeline.effort import Effort
    from autopeft.pipeline.ledger import Ledger
    from autopeft.pipeline.prepare import Prepared

__all__ = [
    "FORWARD",
    "HEAD_ONLY",
    "SCORING",
    "TIERS",
    "fixed_costs",
    "full_training",
    "own_costs",
    "run_cost",
    "trained_costs",
]

FORWARD = 0.5
"""A prediction, as a share of a training pass of adapters: forward, and backward through the activations alone."""

HEAD_ONLY = 0.5
"""A training pass that stops at the classifier."""

SCORING = 1.5
"""A pass that also takes the gradient of every weight."""

TIERS = {"default": 0.3, "race": 1.0, "search": 4.0}
"""Units of one full training that each tier may cost, baselines and the trainings at the end apart."""


def full_training(prepared: Prepared, effort: Effort) -> float:
    """The unit: one training in full on all that is not the test split, in passes."""
    sizes = prepared.task.sizes
    return effort.epochs * effort.fraction * (sizes["inner"] + sizes["outer"])


def run_cost(prepared: Prepared, epochs: int, fraction: float, evaluations: int = 1) -> float:
    """Passes of one training on the inner split and its evaluations on the outer split."""
    sizes = prepared.task.sizes
    return epochs * fraction * sizes["inner"] + FORWARD * evaluations * sizes["outer"]


def fixed_costs(prepared: Prepared) -> dict[str, float]:
    """Passes of the calibration before any training: `scoring`, `bases` that methods ask for, `head` and `svd`.

    The head's probe is one prediction per sample. Singular value decompositions of all matrices, as methods with bases
    of the weight need them, take `4 k^2 d + 8 k d^2 + 9 d^3` operations for (k, d) with k >= d (Golub and Van Loan,
    2013, figure 8.6.1), and are compared with the operations of a training pass, counted on one sample.
    """
    origin = prepared.scores.origin
    found = {"scoring": SCORING * (origin.n_samples + origin.memory_samples)}
    if prepared.basis_samples:
        found["bases"] = SCORING * prepared.basis_samples
    if prepared.probe is not None:
        found["head"] = FORWARD * prepared.task.sizes["inner"]
    if any(method.family == "core" for method in prepared.study.methods.values()):
        found["svd"] = round(_svd_operations(prepared) / _pass_operations(prepared), 3)
    return found


def own_costs(prepared: Prepared, ledger: Ledger) -> dict[str, float]:
    """Passes per stage that count towards a tier."""
    return fixed_costs(prepared) | trained_costs(ledger)


def trained_costs(ledger: Ledger) -> dict[str, float]:
    """Passes of our own trainings, per stage: `default`, `race`, `search` and those that `failed`."""
    trained = ledger.passes()
    return {stage: trained[stage] for stage in ("default", "race", "search", "failed") if stage in trained}


def _svd_operations(prepared: Prepared) -> float:
    total = 0.0
    for site in prepared.catalog.candidates("whole"):
        if site.is_matrix:
            k, d = sorted((site.out_features, site.in_features), reverse=True)
            total += 4 * k * k * d + 8 * k * d * d + 9 * d**3
    return total


def _pass_operations(prepared: Prepared) -> float:
    """Floating point operations of one sample forward and backward through the activations: twice the forward's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    for batch in prepared.task.batches("inner", batch_size=1):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            prepared.task.losses(prepared.model, batch)
        return max(1.0, 2.0 * float(counter.get_total_flops()))
    return 1.0
