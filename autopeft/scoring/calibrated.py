"""Predicted decrease of the validation loss, entry by entry: one currency for every method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.scoring._curvature import CurvatureSums, Frame
from autopeft.scoring._hosts import Known, assemble
from autopeft.scoring._measure import Measured, measure
from autopeft.scoring._moments import Moments
from autopeft.scoring._out_of_fold import fit_out_of_fold
from autopeft.scoring._recall import recall_gradient
from autopeft.scoring._saliency import signed_root
from autopeft.scoring._shrinkage import Noisy, shrink
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.memorising import cosine

__all__ = ["Calibrated", "Memory", "Preconditioner"]

Preconditioner = Literal["diagonal", "kronecker"]
"""In which coordinates a matrix is preconditioned: its entries, or the eigenvectors of two Kronecker factors."""

Memory = Literal["noise_difference", "gap"]
"""What of memorisation is measured: the task's own measure at the start, or how far two halves of the data part."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What training a tensor is expected to take off the validation loss, from one pass over two halves A and C.

    Per tensor, with the mean gradient g, the batches' gradients g_b of b samples and `F = b E[g_b^2]`:

    1. Heads. Gradients of batch number i go through a ridge classifier that has not seen it: at a head fitted on the
       same images they are noise. One forward pass more.
    2. Energy. `E = w U + (1 - w) tau tr F`: U the unbiased squared norm of the true gradient (`CurvatureSums`), w from
       its variance, tau per kind of tensor (`shrink`). Where U is noise, which is so below some thousand images, E is
       the batches' plain squared gradient.
    3. Alignment. Where the halves disagree, cosine c of `P^(1/2) g_A` and `P^(1/2) g_C` below 0, E shrinks by
       `1 - alignment |c|`: a warning and never a verdict; `autopeft.scoring.memorising` lists such places.
    4. Curvature. In coordinates where F is diagonal (entries, or for matrices the eigenvectors of Kronecker factors)
       and with g scaled so that `|g|^2 = E`, the signal of a coordinate is

           g / (F + lambda)^(power / 2)                                             without `reach`,
           sign(g) sqrt(|g| t - F t^2 / 2),  t = min(|g| / (F + lambda), reach)     with `reach`,

       whose squares sum to the predicted decrease of the loss: by a short step of a preconditioned optimiser, or by a
       finite one. An optimiser like Adam moves an entry by its learning rate times the steps at most, however large its
       gradient, so the gain of a place saturates and buying a second place beats deepening the first.

    `lambda` is `damping` times the mean of F over all entries. `signal` is rotated back to entries, so that any method
    reads its captured energy off it as from any other scorer. `score` ranks entries and does not trust the sign of g:
    the same formula of `e_i = w U g_i^2 / |g|^2 + (1 - w) tau F_i` in place of `g^2`, in the coordinates of the
    entries. `half_a` and `half_c` are the halves' mean gradients in those coordinates (scaled and limited alike),
    `square` the mean of squares. Outputs of residual blocks have curvature and lambda of their own.

    With `memory`, the evidence's `memory` holds a second signal in the same coordinates, for `gain.price`. With `P` the
    square of the ratio of step to signal, `1 / (F + lambda)^power` without `reach`, it is

    - `noise_difference`: `P^(1/2) dM`, M the task's own measure (`Recalling.recall`) of what the model has memorised
      before it is trained, for diffusion the mean squared noise difference of the planted images: the square of what
      the reward `noise_difference` is the norm of. Not a statistic of batches, and not scaled to E. Takes a further
      pass over these images.
    - `gap`: the signal of the first half less that of the second, which any task has, from the same pass.

    Options that move single entries step along these and not along the eigenvectors: what they do to memorisation is
    exact to first order with `preconditioner=diagonal`, and an approximation with `kronecker`, as their gain is.

    Memory: four sums per entry in place of three, and two square matrices per matrix, as far as sides are at most
    `largest_side`; a longer side keeps its plain coordinates. `memory` keeps one tensor of the model's size more.

    Attributes:
        gradient: the pass over the data, in mode `per_batch` and one process; its halves are always kept.
        power: exponent p of the curvature, from 0 to 1, without `reach`; Adam's is 1/2.
        damping: share of the mean curvature that is added to each.
        preconditioner: coordinates of matrices.
        reach: how far an entry can move in training, `c * learning rate * steps`; None for an infinitesimal step.
        folds: out-of-fold classifiers; 0 takes gradients through the model's own head.
        alignment: how much of the energy the worst disagreement takes away, from 0 to below 1.
        largest_side: longest side of a matrix that is rotated.
        memory: what of memorisation is measured besides; None for nothing.
    """

    gradient: Gradient = field(default_factory=Gradient)
    power: float = 0.5
    damping: float = 1e-3
    preconditioner: Preconditioner = "kronecker"
    reach: float | None = None
    folds: int = 3
    alignment: float = 0.5
    largest_side: int = 1024
    memory: Memory | None = None

    def __post_init__(self) -> None:
        if self.preconditioner not in get_args(Preconditioner):
            raise UsageError(
                f"calibrated.preconditioner must be one of {', '.join(get_args(Preconditioner))}, got "
                f"{self.preconditioner!r}"
            )
        if self.memory is not None and self.memory not in get_args(Memory):
            raise UsageError(
                f"calibrated.memory must be one of {', '.join(get_args(Memory))}, or null for none, got {self.memory!r}"
            )
        if not 0 <= self.power <= 1:
            raise UsageError(f"calibrated.power must lie between 0 (plain) and 1 (natural gradient), got {self.power}")
        for name, value in (("damping", self.damping), ("reach", self.reach)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"calibrated.{name} must be positive and finite, got {value}")
        if self.folds < 0 or self.folds == 1:
            raise UsageError(f"calibrated.folds must be at least 2, or 0 for the model's own head, got {self.folds}")
        if not 0 <= self.alignment < 1:
            raise UsageError(f"calibrated.alignment must be at least 0 and below 1, got {self.alignment}")
        if self.largest_side < 1:
            raise UsageError(f"calibrated.largest_side must be at least 1, got {self.largest_side}")

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every tensor of the catalogue on the task's inner split.

        Args:
            model: the model, on its device; left as it was found.
            catalog: its catalogue.
            task: the task.
            seed: of the order and augmentation of the samples, and with them of the folds.

        Raises:
            AutopeftError: as `Gradient.score` does.
            DataError: when there are fewer batches than folds.
            UsageError: in mode `per_sample`, in a process group of several ranks, when the classifier cannot be
                fitted in closed form, or with `memory=noise_difference` for a task that has no measure of its own or no
                samples to take it on.
        """
        settings = replace(self.gradient, halves=True)
        sums: dict[str, CurvatureSums] = {}
        matrices = {f"{site.module}.{site.parameter}".lstrip(".") for site in catalog if site.is_matrix}

        def make(key: str, shape: torch.Size, like: Tensor, halves: bool) -> Moments:
            rotated = self.preconditioner == "kronecker" and key in matrices
            sides = (shape[0], math.prod(shape[1:])) if rotated else (0, 0)
            left, right = (1 < side <= self.largest_side for side in sides)
            sums[key] = CurvatureSums(shape, like, halves, left, right)
            return sums[key]

        used = fit_out_of_fold(model, catalog, task, settings, seed, self.folds).used if self.folds else None
        found = measure(settings, model, catalog, task, seed, make, used)
        slopes: dict[str, Tensor] | None = None
        passed = 0
        if self.memory == "noise_difference":
            slopes, passed = recall_gradient(model, catalog, task, settings, seed)
        known: dict[str, Known] = {}
        outputs = {site.name for site in found.hosts.blocks} & set(found.known)
        for keys in (set(found.known) - outputs, outputs):
            part = {key: k for key, k in found.known.items() if key in keys}
            known |= self._finished(part, sums, found, slopes or {})
        origin = replace(found.origin(self, catalog, task), memory=self.memory or "", memory_samples=passed)
        return assemble(catalog, found.hosts, known, origin)

    def _finished(
        self, known: dict[str, Known], sums: dict[str, CurvatureSums], found: Measured, slopes: dict[str, Tensor]
    ) -> dict[str, Known]:
        """Evidence of tensors that share one damping."""
        scale = found.samples / found.units
        entries = sum(k.score.numel() for k in known.values())
        total = math.fsum(float(k.score.sum(dtype=torch.float64)) for k in known.values())
        damping = self.damping * scale * total / found.units / max(entries, 1)
        families: dict[int, list[str]] = {}
        for key, k in known.items():
            # Matrices, vectors and tokens: what differs is how many samples' worth of coherence they show.
            families.setdefault(k.score.ndim if k.score.ndim != 4 else 2, []).append(key)
        done: dict[str, Known] = {}
        for keys in families.values():
            live = [key for key in keys if float(known[key].score.sum(dtype=torch.float64)) > 0]
            measured = []
            for key in live:
                agreement = sums[key].agreement()
                fisher = float(known[key].score.sum(dtype=torch.float64)) * scale / found.units
                measured.append(Noisy(agreement.energy, agreement.variance, fisher))
            weights, tau = shrink(measured, 1 / found.samples)
            for key, noisy, w in zip(live, measured, weights, strict=True):
                # The sum of squares becomes their mean.
                mean = replace(known[key], score=known[key].score.div_(found.units))
                done[key] = self._one(mean, sums.pop(key), noisy, w, tau, scale, damping, slopes.get(key))
            for key in set(keys) - set(live):
                # No gradient at all: everything is zero and stays so, and no step is made that could change anything.
                nothing = None if self.memory is None else torch.zeros_like(known[key].signal)
                done[key] = replace(known[key], square=known[key].score, memory=nothing)
        return done

    def _one(
        self,
        known: Known,
        sums: CurvatureSums,
        noisy: Noisy,
        w: float,
        tau: float,
        scale: float,
        damping: float,
        slope: Tensor | None,
    ) -> Known:
        assert known.half_a is not None
        assert known.half_c is not None
        curvature = known.score * scale
        root = (curvature + damping).pow_(self.power / 2)
        agree = cosine(known.half_a / root, known.half_c / root)
        trust = 1 + self.alignment * min(agree, 0.0)
        norm = float(torch.linalg.vector_norm(known.signal, dtype=torch.float64)) ** 2
        signal_part, prior_part = w * max(noisy.energy, 0.0) * trust, (1 - w) * tau * trust
        stretch = math.sqrt((signal_part + prior_part * noisy.fisher) / norm) if norm > 0 else 0.0

        def own(gradient: Tensor) -> Tensor:
            return self._gain_root(gradient * stretch, curvature, damping)

        energies = curvature * prior_part
        if norm > 0:
            energies.add_(known.signal.square(), alpha=signal_part / norm)
        rotated = sums.left is not None or sums.right is not None
        frame = sums.frame(curvature.flatten(1)) if rotated else Frame(None, None, curvature)

        def turned(tensor: Tensor) -> Tensor:
            return frame.rotate(tensor.flatten(1) if rotated else tensor)

        def rooted(tensor: Tensor) -> Tensor:
            return self._gain_root(turned(tensor * stretch), frame.curvature, damping)

        memory = None
        if self.memory == "gap":
            memory = frame.restore(rooted(known.half_a) - rooted(known.half_c)).view(known.signal.shape)
        elif slope is not None:
            ratio = self._step_root(turned(known.signal * stretch), frame.curvature, damping)
            memory = frame.restore(turned(slope.to(ratio.dtype)) * ratio).view(known.signal.shape)
        signal = frame.restore(rooted(known.signal)).view(known.signal.shape)
        return Known(
            signal=signal,
            score=self._gain_root(energies.sqrt_(), curvature, damping).square_(),
            half_a=own(known.half_a),
            half_c=own(known.half_c),
            square=known.score,
            memory=memory,
        )

    def _gain_root(self, gradient: Tensor, curvature: Tensor, damping: float) -> Tensor:
        """Per coordinate the signed root of the gain."""
        if self.reach is None:
            return gradient / (curvature + damping).pow_(self.power / 2)
        size = gradient.abs()
        step = (size / (curvature + damping)).clamp_(max=self.reach)
        gain = size.mul_(step).sub_(step.square().mul_(curvature), alpha=0.5)
        return signed_root(gain.clamp_(min=0), gradient)

    def _step_root(self, gradient: Tensor, curvature: Tensor, damping: float) -> Tensor:
        """Per coordinate the ratio of the step to the signal: the root of the preconditioner."""
        if self.reach is None:
            return (curvature + damping).pow_(-self.power / 2)
        # With t the step and s the signal, s^2 / t^2 = |g| / t - F / 2, and |g| / t is the larger of these two.
        bend = torch.maximum(curvature + damping, gradient.abs() / self.reach)
        return bend.sub_(curvature, alpha=0.5).rsqrt_()
