"""AdaLoRA's budget of ranks over all sites of a method, kept by PEFT's own allocator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.methods._peft_layer import ADAPTER, config_class
from autopeft.methods._peft_tuners import TUNERS
from autopeft.methods.peft_adapter import PeftAdapter

__all__ = ["RankPool"]

_FACTORS = ("lora_A", "lora_B", "lora_E")

_WARM_UP = 0.1
"""Share of the steps before ranks are cut, where the study sets no `tinit`."""

_SETTLE = 0.2
"""Share of the steps after it, where the study sets no `tfinal`."""


class RankPool:
    """Cuts the ranks of AdaLoRA's layers to their budget while they train (Zhang et al., 2023, arXiv 2303.10512).

    PEFT's allocator makes the schedule and chooses what to cut. Sensitivities are averaged as each gradient arrives,
    and not after the optimizer's step as PEFT's model does, so that a training that is continued from a checkpoint
    cuts alike; the averages and the last choice are part of the training state and not of what is exported.

    Args:
        adapters: the adapters of one method. Their sizes are the initial ranks.
    """

    def __init__(self, adapters: Sequence[PeftAdapter]) -> None:
        self._adapters = list(adapters)
        self._layers = nn.ModuleDict({str(i): a.layer for i, a in enumerate(adapters)})
        settings = dict(adapters[0].settings)
        self._set = {name for name in ("tinit", "tfinal") if name in settings}
        self._config = config_class("adalora", TUNERS["adalora"])(**settings, target_modules=["h0"])
        self._total = 0
        self._step = 0
        self._allocator: Any = None
        for adapter in adapters:
            adapter.waiting = ""
            for factor in _FACTORS:
                parameter = getattr(adapter.layer, factor)[ADAPTER]
                for kind in ("mean", "spread"):
                    adapter.keep_while_training(f"{factor}_{kind}", torch.zeros_like(parameter.detach()))
                parameter.register_post_accumulate_grad_hook(_Watch(self, adapter, factor))
            kept = torch.ones_like(adapter.layer.lora_E[ADAPTER].detach(), dtype=torch.bool)
            adapter.keep_while_training("kept", kept)

    def advance(self, step: int, total: int) -> None:
        """Cut what the schedule says after the step before this one."""
        self._begin(total)
        self._step = step
        done = step - 1
        if done < 0:
            return
        settled = total - self._config.tfinal
        allocator = self._allocator
        if done > settled:
            with torch.no_grad():
                for adapter in self._adapters:
                    adapter.layer.lora_E[ADAPTER].mul_(adapter.get_buffer("kept"))
            return
        budget, due = allocator.budget_schedule(done)
        if (due or done == settled) and budget < allocator.init_bgt:
            for i, adapter in enumerate(self._adapters):
                for factor in _FACTORS:
                    name = f"{i}.{factor}.{ADAPTER}"
                    allocator.exp_avg_ipt[name] = adapter.get_buffer(f"{factor}_mean")
                    allocator.exp_avg_unc[name] = adapter.get_buffer(f"{factor}_spread")
            chosen = allocator.mask_to_budget(self._layers, budget)
            for i, adapter in enumerate(self._adapters):
                kept = adapter.get_buffer("kept")
                kept.copy_(torch.tensor(chosen[f"{i}.lora_E.{ADAPTER}"], device=kept.device).view_as(kept))

    def _begin(self, total: int) -> None:
        """Fix the schedule, once the number of steps is known."""
        if self._total == total:
            return
        from peft.tuners.adalora.layer import RankAllocator

        self._total = total
        changes: dict[str, Any] = {"total_step": total}
        if "tinit" not in self._set:
            changes["tinit"] = int(_WARM_UP * total)
        if "tfinal" not in self._set:
            changes["tfinal"] = int(_SETTLE * total)
        self._config = dataclasses.replace(self._config, **changes)
        self._allocator = RankAllocator(self._layers, self._config, ADAPTER)
        # PEFT has one target for all layers; here each site's rank has its own.
        self._allocator.target_bgt = sum(int(a.settings["target_r"]) for a in self._adapters)

    def watch(self, adapter: PeftAdapter, factor: str, parameter: Tensor) -> None:
        """Average the sensitivity |w dL/dw| of one factor and its spread; equations 9 to 11 of the paper."""
        if parameter.grad is None or self._step >= self._total - self._config.tfinal:
            return
        mean, spread = adapter.get_buffer(f"{factor}_mean"), adapter.get_buffer(f"{factor}_spread")
        with torch.no_grad():
            now = (parameter * parameter.grad).abs()
            mean.mul_(self._config.beta1).add_(now, alpha=1 - self._config.beta1)
            spread.mul_(self._config.beta2).add_((now - mean).abs(), alpha=1 - self._config.beta2)

    def penalty(self) -> Tensor:
        """`orth_reg_weight` times the mean over all factors of ||P P^T - I||; equation 4 of the paper."""
        terms = []
        for adapter in self._adapters:
            down, up = adapter.layer.lora_A[ADAPTER], adapter.layer.lora_B[ADAPTER]
            for gram in (down @ down.T, up.T @ up):
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)))
        weight: float = self._config.orth_reg_weight
        return weight * torch.stack(terms).mean()


@dataclasses.dataclass(slots=True, eq=False)
class _Watch:
    """The hook of one factor."""

    pool: RankPool
    adapter: PeftAdapter
    factor: str

    def __call__(self, parameter: Tensor) -> None:
        self.pool.watch(self.adapter, self.factor, parameter)
