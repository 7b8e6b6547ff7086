"""The directions that the gradients of two halves of the data agree on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.site import Catalog
from autopeft.scoring.gradient import Gradient

__all__ = ["agreed_directions", "aligned_bases"]


def aligned_bases(
    model: nn.Module, catalog: Catalog, task: Task, settings: Gradient, seed: int, rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """`agreed_directions` of every matrix, from one pass over two disjoint halves of the inner split.

    Args:
        model: the model, on its device; left as it was found.
        catalog: its catalogue.
        task: the task, whose inner split is looked at.
        settings: which samples, in batches of which size.
        seed: of their order.
        rank: directions wanted.

    Returns:
        As `autopeft.scoring.activation.activation_bases`.

    Raises:
        AutopeftError: as `Gradient.score` does.
    """
    scores = dataclasses.replace(settings, halves=True, blocks=False).score(model, catalog, task, seed)
    found = {}
    for name, evidence in scores.evidence.items():
        known = evidence.get("weight") if evidence.site.is_matrix else None
        if known is not None and known.half_a is not None and known.half_c is not None:
            found[name] = agreed_directions(known.half_a, known.half_c, rank)
    return found, scores.origin.n_samples


def agreed_directions(half_a: Tensor, half_c: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the largest eigenvalues of the symmetric parts of `A C^T` (left) and of `A^T C` (right).

    The noise of the halves is independent, so that `E[A C^T] = G G^T` with G the noiseless gradient: what ranks the
    directions is the energy that would still be there on other data, where the singular values of `(A + C) / 2` also
    count noise.

    Args:
        half_a: A, of any rank >= 2, flattened to (out, in).
        half_c: C, of the same shape.
        rank: directions wanted.

    Returns:
        (out, n) and (in, n), float32 on the CPU, n the smallest of `rank` and the two sides; the largest entry of each
        vector is positive.
    """
    a, c = (half.detach().flatten(1).to(device="cpu", dtype=torch.float64) for half in (half_a, half_c))
    kept = min(*a.shape, rank)
    return _leading(a @ c.T, kept), _leading(a.T @ c, kept)


def _leading(product: Tensor, rank: int) -> Tensor:
    _, vectors = torch.linalg.eigh((product + product.T) / 2)
    leading = vectors.flip(1)[:, :rank]
    largest = leading.abs().argmax(dim=0)
    signed: Tensor = leading * leading.gather(0, largest[None])[0].sign()
    return signed.float().contiguous()
