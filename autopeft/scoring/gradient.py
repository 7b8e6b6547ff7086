"""Squared gradients: the sensitivity of SPT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from autopeft.core.contracts import Task
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.scoring._hooks import Amp
from autopeft.scoring._hosts import assemble
from autopeft.scoring._measure import measure

__all__ = ["Gradient", "Mode", "Order"]

Mode = Literal["per_batch", "per_sample"]
Order = Literal["shuffled", "file"]


@dataclass(frozen=True, slots=True)
class Gradient:
    """Sensitivity of every entry of a model: the sum of its squared gradients.

    To first order, one step of gradient descent of length e on entry n alone lowers the loss by `e g_n^2` (He et al.,
    "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, arXiv 2303.08566). Per entry the evidence
    holds, over the batches b of n_b samples (over the samples, in mode `per_sample`):

    - `score`: `sum_b g_b^2`, what SPT ranks entries by;
    - `signal`: the mean gradient over all samples, `half_a` and `half_c` that over each half of the batches;
    - `square`: `mean_b g_b^2`, where asked for.

    For a residual block, slot `output` holds the same of the (channels, channels) matrix `sum_t dL/dy_t y_t^T` over
    its output's tokens t: the gradient of a linear map after the block.

    The two modes agree for batches of one sample only: the square of a mean over B samples is expected to be
    `Var(g) / B + E[g]^2`, the mean of squares `Var(g) + E[g]^2`. Small batches keep most of what tells them apart.

    The model is scored in evaluation mode (no dropout, no stochastic depth, frozen BatchNorm statistics), and sums are
    kept in float32. In mode `per_batch` gradients are consumed and freed one tensor at a time while the backward pass
    runs, so that memory is the model, two sums per entry (three with halves) and one layer's gradient. Mode
    `per_sample` computes the same signal, and squares from each layer's saved input and output gradient, `chunk`
    samples at a time; what no formula is exact for takes a pass per sample.

    Where `torch.distributed` is initialised, every rank of the default group must call `score` with the same model,
    catalogue, task, settings and seed. Rank r of R passes every batch whose number is r modulo R through the model, the
    sums are added up over the ranks, and all of them return the same scores: those of one rank, but for the rounding
    of sums in another order.

    Attributes:
        mode: what is squared: the mean gradient of a batch, or the gradient of a sample.
        batch_size: samples per micro-batch.
        max_batches: batches to look at, at most; None for no limit.
        max_samples: samples to look at, at most; None for no limit.
        order: `shuffled` draws batches as training does, augmentation included, with the study's seed; `file` takes
            the first samples of the split in file order without augmentation, as SPT's code does.
        halves: whether mean gradients of both halves are kept, for choosing on one and valuing on the other.
        squares: whether the mean of squares is kept beside their sum.
        blocks: whether the output matrices of residual blocks are kept.
        chunk: samples whose gradients of one tensor are formed together, in mode `per_sample`; results do not depend
            on it.
        amp: `bf16` runs the forward pass under autocast to bfloat16, with gradients of eight significant bits; sums
            are kept in float32 all the same.
    """

    mode: Mode = "per_batch"
    batch_size: int = 8
    max_batches: int | None = None
    max_samples: int | None = 512
    order: Order = "shuffled"
    halves: bool = False
    squares: bool = False
    blocks: bool = True
    chunk: int = 8
    amp: Amp = "off"

    def __post_init__(self) -> None:
        for name, known in (("mode", get_args(Mode)), ("order", get_args(Order)), ("amp", get_args(Amp))):
            if getattr(self, name) not in known:
                raise UsageError(f"gradient.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "max_batches", "max_samples", "chunk"):
            value = getattr(self, name)
            if value is None and name.startswith("max"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"gradient.{name} must be an integer of at least 1, got {value!r}")

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every tensor of the catalogue on the task's inner split.

        Args:
            model: the model, on its device; left as it was found. The evidence's `value` shares its memory when the
                model is on the CPU.
            catalog: its catalogue.
            task: the task; its `loss` in mode `per_batch`, its `losses` in mode `per_sample`.
            seed: of the order and augmentation of the samples.

        Raises:
            AutopeftError: when another rank failed.
            DataError: when the inner split is too small.
            Diverged: when a loss or a score is not finite.
            UsageError: when the catalogue is of another model, or the model uses reentrant checkpointing.
        """
        found = measure(self, model, catalog, task, seed)
        known = found.known
        if self.squares:
            known = {key: replace(k, square=k.score / found.units) for key, k in known.items()}
        return assemble(catalog, found.hosts, known, found.origin(self, catalog, task))
