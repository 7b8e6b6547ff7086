"""Gradient signal preservation: what removing an entry would do to the gradient flow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopeft.core.contracts import Task
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.scoring._batches import portions
from autopeft.scoring._hosts import Known, assemble
from autopeft.scoring._measure import measure
from autopeft.scoring._saliency import signed_root, values_of
from autopeft.scoring._streaming import usable_loss
from autopeft.scoring.borrow import borrowed
from autopeft.scoring.gradient import Gradient

__all__ = ["GraSP"]


@dataclass(frozen=True, slots=True)
class GraSP:
    """`score = |w (H g)|`, `signal = sign(g) sqrt(score)`: g the mean gradient, H the Hessian of the mean loss.

    To first order `-w H g` is the change of the gradient flow `g^T g / 2` when the entry is taken away (Wang, Zhang and
    Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, arXiv 2002.07376, equation
    8). GraSP keeps the entries whose removal would lower it; for tuning, a large change either way says that the entry
    matters for the flow, so the size is taken unless `absolute` is off.

    H g takes a second pass over the same samples, by differentiating `g_b^T g` through the backward pass: several times
    the memory of a training step, in the model's own precision, and attention without fused kernels. Outputs of
    residual blocks hold no value, so nothing is kept about them.

    Attributes:
        gradient: the passes over the data.
        absolute: whether the size counts; off is GraSP's order: `max(w H g, 0)`.
    """

    gradient: Gradient = field(default_factory=Gradient)
    absolute: bool = True

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every tensor of the catalogue on the task's inner split.

        Args:
            model: the model, on its device; left as it was found.
            catalog: its catalogue.
            task: the task.
            seed: of the order and augmentation of the samples.

        Raises:
            AutopeftError: as `Gradient.score` does.
        """
        settings = replace(self.gradient, blocks=False)
        found = measure(settings, model, catalog, task, seed)
        product = self._product(settings, model, found.hosts.parameters, task, seed, found.known)
        known = {}
        for key, value in values_of(found.hosts):
            k = found.known[key]
            change = product.pop(key).mul_(value)
            score = change.abs_() if self.absolute else change.clamp_(min=0)
            known[key] = replace(k, signal=signed_root(score, k.signal), score=score)
        return assemble(catalog, found.hosts, known, found.origin(self, catalog, task))

    @staticmethod
    def _product(
        settings: Gradient,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        task: Task,
        seed: int,
        known: dict[str, Known],
    ) -> dict[str, Tensor]:
        """H g by key, on the CPU."""
        leaves = list(parameters.values())
        along = [known[key].signal.to(p.device, p.dtype) for key, p in parameters.items()]
        total = [torch.zeros_like(v) for v in along]
        samples = 0
        with borrowed(model, leaves), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch, n, _ in portions(task, settings, seed):
                loss = usable_loss(task.loss(model, batch))
                first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
                flow = sum((g * v).sum() for g, v in zip(first, along, strict=True) if g is not None)
                if isinstance(flow, Tensor) and flow.requires_grad:
                    second = torch.autograd.grad(flow, leaves, allow_unused=True)
                    for sums, h in zip(total, second, strict=True):
                        if h is not None:
                            sums.add_(h, alpha=n)
                samples += n
        return {key: sums.div_(samples).cpu() for key, sums in zip(parameters, total, strict=True)}
