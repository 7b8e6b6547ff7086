"""The directions in which a layer's inputs, and the gradients of its outputs, vary most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.site import Catalog, Site
from autopeft.scoring._batches import portions
from autopeft.scoring._hooks import backward, when_known
from autopeft.scoring._rows import input_rows
from autopeft.scoring._streaming import channel_rows, usable_loss
from autopeft.scoring.borrow import borrowed
from autopeft.scoring.gradient import Gradient

__all__ = ["activation_bases"]

_OVERSAMPLING = 2
"""Columns of a sketch per direction that is wanted (Tropp et al., 2017, section 1.6)."""


def activation_bases(
    model: nn.Module, catalog: Catalog, task: Task, settings: Gradient, seed: int, rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Orthonormal bases of the two sides of every matrix, from what flows into it and back out of it.

    On the right the eigenvectors of `sum x x^T` over the layer's input rows, those of the largest eigenvalues first:
    what EVA starts LoRA's A from (Paischer et al., 2024, arXiv 2410.07170, section 3.1), not centred here, because a
    change that reads the mean input is one worth having. On the left those of `sum dy dy^T`, dy the gradient of the
    summed loss with respect to an output row. Both come from one pass that keeps a sketch of `2 rank` columns per side
    (the Nystroem approximation of Tropp et al., "Fixed-Rank Approximation of a Positive-Semidefinite Matrix from
    Streaming Data", 2017, algorithm 3), exact where a side has no more than these, and no gradient of a weight.

    Args:
        model: the model, on its device; left as it was found.
        catalog: its catalogue.
        task: the task, whose inner split is looked at.
        settings: which samples, in batches of which size.
        seed: of their order and of the sketches.
        rank: directions wanted.

    Returns:
        Name of every matrix to (out_features, n) and (in_features, n), float32 on the CPU, with n the smallest of
        `rank` and the two sides; and the number of samples seen. Layers that are never called are left out.

    Raises:
        DataError: when the inner split is empty.
        Diverged: when a loss is not finite.
    """
    sites: dict[str, list[Site]] = {}
    for site in catalog:
        if site.is_matrix and "weight" in site.slots:
            sites.setdefault(site.module, []).append(site)
    generator = torch.Generator().manual_seed(seed)
    reads: dict[str, _Sketch] = {}
    writes: dict[str, _Sketch] = {}
    for module, owners in sites.items():
        reads[module] = _Sketch(owners[0].in_features, rank, generator)
        for site in owners:
            writes[site.name] = _Sketch(site.out_features, rank, generator)
    samples = 0
    with borrowed(model, ()), torch.enable_grad(), contextlib.ExitStack() as stack:
        for module, owners in sites.items():
            hook = _watcher(owners, reads[module], writes)
            stack.callback(model.get_submodule(module).register_forward_hook(hook).remove)
        for batch, n, _ in portions(task, settings, seed):
            loss = usable_loss(task.loss(model, batch))
            # The sum's gradient, so that the last, smaller batch counts by its samples.
            backward(loss * n)
            samples += n
    found = {}
    for module, owners in sites.items():
        for site in owners:
            kept = min(rank, site.out_features, site.in_features)
            left, right = writes[site.name].leading(kept), reads[module].leading(kept)
            if left is not None and right is not None:
                found[site.name] = (left, right)
    return found, samples


class _Sketch:
    """`C Omega` of a positive semi-definite C that arrives as rows, C the sum of their outer products."""

    def __init__(self, side: int, rank: int, generator: torch.Generator) -> None:
        columns = min(side, _OVERSAMPLING * rank)
        if columns == side:
            self._test = torch.eye(side)
        else:
            draw = torch.randn(side, columns, generator=generator, dtype=torch.float64)
            self._test = torch.linalg.qr(draw)[0].float()
        self._product = torch.zeros(side, columns, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows (n, side)."""
        rows = rows.detach().float()
        self._product += (rows.T @ (rows @ self._test.to(rows.device))).cpu().double()

    def leading(self, rank: int) -> Tensor | None:
        """The first eigenvectors (side, rank), the largest entry of each positive; None when nothing arrived."""
        scale = float(torch.linalg.matrix_norm(self._product))
        if not scale > 0:
            return None
        test = self._test.double()
        shift = scale * 1e-7  # Sums of float32 products are no more exact than that.
        shifted = self._product + shift * test
        core = test.T @ shifted
        factor = torch.linalg.cholesky((core + core.T) / 2)
        root = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        vectors: Tensor = torch.linalg.svd(root, full_matrices=False)[0][:, :rank]
        largest = vectors.abs().argmax(dim=0)
        signed: Tensor = vectors * vectors.gather(0, largest[None])[0].sign()
        return signed.float().contiguous()


def _watcher(
    owners: list[Site], read: _Sketch, writes: dict[str, _Sketch]
) -> Callable[[nn.Module, Any, Any], Tensor | None]:
    def watch(module: nn.Module, given: Any, output: Any) -> Tensor | None:
        if not given or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            return None
        whole = owners[0]
        read.add(input_rows(whole, module, given[0].detach()))
        # Frozen parameters: the graph begins at the first of these outputs, and no weight's gradient is ever made.
        if output.requires_grad:
            fresh = None
        else:
            output = fresh = output + torch.zeros((), device=output.device, dtype=output.dtype, requires_grad=True)

        def arrive(gradient: Tensor) -> None:
            rows = channel_rows(gradient, whole.channel_axis, 1).squeeze(0)
            for site, part in _parts(owners, rows):
                writes[site.name].add(part)

        when_known(output, arrive)
        return fresh

    return watch


def _parts(owners: list[Site], rows: Tensor) -> Iterator[tuple[Site, Tensor]]:
    for site in owners:
        yield site, rows if site.rows is None else rows[:, site.rows[0] : site.rows[1]]
