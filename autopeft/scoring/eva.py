"""EVA: how much of a layer's inputs few directions explain."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.scores import ScoreOrigin, Scores
from autopeft.core.site import Catalog, Site
from autopeft.scoring._batches import portions
from autopeft.scoring._hosts import Hosts, Known, assemble
from autopeft.scoring._rows import input_rows
from autopeft.scoring.borrow import borrowed
from autopeft.scoring.gradient import Gradient

__all__ = ["EVA"]


@dataclass(frozen=True, slots=True)
class EVA:
    """The spectrum of each matrix's inputs: energies of rank r are shares of explained variance.

    With C the covariance of a layer's inputs over all tokens, `C = V diag(s) V^T`, the signal is the (out, in) matrix
    `Q diag(sqrt(s / sum(s))) V^T`, so that its r largest squared singular values sum to the variance ratio by which EVA
    shares ranks out (Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance
    Adaptation", 2024, arXiv 2410.07170, section 3). Q has orthonormal columns of the discrete cosine transform: inputs
    say nothing of the outputs, so its rows are as alike as can be. Only as many directions as the matrix has rows
    are kept. `score` is the squared signal, so that a matrix sums to 1 or a little less.

    A control that looks at the data and not at the labels. It has nothing to say about vectors, tokens and outputs,
    whose signals are zero or absent. One (in, in) matrix per layer is kept during the pass. Convolutions see their
    patches with zeros around them, or no surroundings where their padding is a word.

    Attributes:
        gradient: which samples are looked at; nothing but the forward pass is run.
    """

    gradient: Gradient = field(default_factory=Gradient)

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every matrix of the catalogue on the task's inner split.

        Args:
            model: the model, on its device; left as it was found.
            catalog: its catalogue.
            task: the task.
            seed: of the order and augmentation of the samples.

        Raises:
            DataError: when the inner split is too small.
            UsageError: when the catalogue is of another model.
        """
        start = time.perf_counter()
        hosts = Hosts(model, catalog)
        inputs: dict[str, _Inputs] = {}
        samples = 0
        with borrowed(model), torch.no_grad(), contextlib.ExitStack() as stack:
            for site in catalog:
                key = hosts.key(site, "weight")
                if site.is_matrix and key is not None and not site.parent:
                    seen = inputs.setdefault(key, _Inputs(site.in_features, hosts.parameters[key]))
                    module = model.get_submodule(site.module)
                    stack.callback(module.register_forward_pre_hook(_watcher(site, seen)).remove)
            for batch, n, _ in portions(task, self.gradient, seed):
                task.loss(model, batch)
                samples += n
        known: dict[str, Known] = {}
        for key, parameter in hosts.parameters.items():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            signal = torch.zeros(parameter.shape, dtype=dtype)
            if key in inputs:
                signal += inputs.pop(key).spectrum(len(parameter)).to(dtype).view(parameter.shape)
            known[key] = Known(signal, signal.square())
        seconds = round(time.perf_counter() - start, 3)
        origin = ScoreOrigin(repr(self), samples, catalog.fingerprint, data=task.data_hash, seconds=seconds)
        return assemble(catalog, hosts, known, origin)


class _Inputs:
    """Running sums over the input rows of one layer, in float32 or wider."""

    def __init__(self, width: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._sum = torch.zeros(width, dtype=dtype, device=like.device)
        self._square = torch.zeros(width, width, dtype=dtype, device=like.device)
        self._rows = 0

    def add(self, rows: Tensor) -> None:
        """Input rows, (n, width)."""
        rows = rows.to(self._sum.dtype)
        self._sum += rows.sum(0)
        self._square.addmm_(rows.T, rows)
        self._rows += len(rows)

    def spectrum(self, outputs: int) -> Tensor:
        """The signal, float64 of shape (outputs, width); zero when the inputs do not vary."""
        mean = (self._sum / max(self._rows, 1)).cpu().double()
        covariance = self._square.cpu().double() / max(self._rows, 1) - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
        total = float(values.sum())
        # What is left of subtracting two equal numbers is no variance.
        if total <= 1e-12 * float(mean.square().sum()):
            return torch.zeros(outputs, len(values), dtype=torch.float64)
        kept = min(outputs, len(values))
        signal: Tensor = (_cosines(outputs, kept) * (values[:kept] / total).sqrt()) @ vectors[:, :kept].T
        return signal


def _cosines(rows: int, columns: int) -> Tensor:
    """Orthonormal columns of the discrete cosine transform (type II), the constant one first."""
    i, j = torch.arange(rows, dtype=torch.float64), torch.arange(rows, dtype=torch.float64)
    basis = torch.cos(math.pi / rows * (i[:, None] + 0.5) * j) * math.sqrt(2 / rows)
    basis[:, 0] /= math.sqrt(2)
    return basis[:, :columns]


def _watcher(site: Site, seen: _Inputs) -> Callable[[nn.Module, Any], None]:
    def watch(module: nn.Module, given: Any) -> None:
        if not given or not isinstance(given[0], Tensor):
            return
        seen.add(input_rows(site, module, given[0].detach()))

    return watch
