"""AdamW with one learning rate per family of methods, and a schedule that is a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from autopeft.core.contracts import Inserted, Method
from autopeft.errors import BudgetMismatch, UsageError
from autopeft.training.rates import Sizes, decay_factor, head_factor, is_decayed, rate_factor, sizes_of
from autopeft.training.settings import TrainSettings

__all__ = ["make_optimizer", "optimised_count", "schedule_factor", "set_rates"]

_HEAD = "head"


def make_optimizer(inserted: Inserted, settings: TrainSettings, methods: Mapping[str, Method]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over everything that is trainable in the model.

    Each parameter group carries `key` (the method key, or `head`) and `peak`, its largest learning rate: that of the
    method's family, times what `rate_rule` and `lora_plus` make of the tensor's size and role.

    Args:
        inserted: the model with adapters.
        settings: rates, decay and moments.
        methods: method key to method; its family picks the rate.

    Raises:
        BudgetMismatch: when the optimizer's scalars without the head are not as many as the plan costs: the third of
            four independent counts.
        UsageError: for a method key without a method.
    """
    for key in inserted.groups():
        if key != _HEAD and key not in methods:
            raise UsageError(f"the plan uses the method {key!r}, but the study has only {', '.join(methods) or 'none'}")
    sizes = sizes_of(inserted, methods)
    groups: list[dict[str, object]] = []
    for key, parameters in inserted.groups().items():
        members: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in (p for p in parameters if p.requires_grad):
            known = None if key == _HEAD else sizes[id(parameter)]
            family = _HEAD if key == _HEAD else methods[key].family
            members.setdefault(_rate_and_decay(settings, family, known, parameter), []).append(parameter)
        # Decayed tensors first, then as they were found.
        for (peak, decay), alike in sorted(members.items(), key=lambda item: item[0][1] == 0.0):
            groups.append({"params": alike, "lr": peak, "peak": peak, "key": key, "weight_decay": decay})
    if not groups:
        raise UsageError("nothing in the model is trainable: the plan is empty and the model has no head")
    optimizer = torch.optim.AdamW(groups, lr=settings.rates.head, betas=settings.betas, eps=settings.eps)
    counted, planned = optimised_count(optimizer), inserted.allocation.trainable
    if counted != planned:
        raise BudgetMismatch(
            f"the optimizer holds {counted:,} trainable scalars without the head, but the plan costs {planned:,}; "
            f"per method: {_per_method(optimizer)}"
        )
    return optimizer


def _rate_and_decay(
    settings: TrainSettings, family: str, sizes: Sizes | None, parameter: nn.Parameter
) -> tuple[float, float]:
    """Peak learning rate and weight decay of one tensor; `sizes` is None for the head's."""
    rate = settings.rates.of(family)
    if sizes is None:
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        return rate * head_factor(settings.head_rule, parameter), decay
    rate *= rate_factor(settings.rate_rule, sizes)
    if family == "matrix" and sizes.role == "up":
        rate *= settings.lora_plus
    decayed = is_decayed(settings.decay_rule, sizes, parameter)
    return rate, settings.weight_decay * decay_factor(settings.decay_rule, sizes) if decayed else 0.0


def optimised_count(optimizer: torch.optim.Optimizer) -> int:
    """Scalars that the optimizer changes, each once, the head not counted."""
    counted = {id(p): p.numel() for g in optimizer.param_groups if g["key"] != _HEAD for p in g["params"]}
    return sum(counted.values())


def schedule_factor(step: int, total: int, warmup_fraction: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then half a cosine (Loshchilov and Hutter, 2017).

    With w warm-up steps of T: `(step + 1) / w` while step < w, then `(1 + cos(pi (step - w) / (T - w))) / 2`. The first
    step is taken at a rate above 0 and the last one as well.

    Args:
        step: steps taken so far, from 0 to `total - 1`.
        total: steps of the whole schedule.
        warmup_fraction: share of the steps that warm up, rounded to whole steps.
    """
    if not 0 <= step < total:
        raise UsageError(f"the schedule has {total} steps, numbered from 0; step {step} is not among them")
    warmup = round(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _per_method(optimizer: torch.optim.Optimizer) -> str:
    counts: dict[str, int] = {}
    for group in optimizer.param_groups:
        counts[group["key"]] = counts.get(group["key"], 0) + sum(p.numel() for p in group["params"])
    return ", ".join(f"{key} {n:,}" for key, n in counts.items())
