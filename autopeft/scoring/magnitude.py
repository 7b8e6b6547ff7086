"""Magnitudes: a control that looks at no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from autopeft.core.contracts import Task
from autopeft.core.scores import ScoreOrigin, Scores
from autopeft.core.site import Catalog
from autopeft.scoring._hosts import Hosts, Known, assemble

__all__ = ["Magnitude"]


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Scores every entry by its squared pre-trained value; the signal is the value itself.

    A control for sensitivity scores: it knows the model and not the task. It has nothing to say about the outputs of
    residual blocks, whose matrices are zero.
    """

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every tensor of the catalogue; the task is not looked at and the seed has no effect.

        Raises:
            UsageError: when the catalogue is of another model.
        """
        hosts = Hosts(model, catalog)
        known: dict[str, Known] = {}
        for key, parameter in hosts.parameters.items():
            value = parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32), copy=True)
            known[key] = Known(value, value.square())
        for site in hosts.blocks:
            known[site.name] = Known(*torch.zeros(2, site.shape[0], site.shape[0]))
        return assemble(catalog, hosts, known, ScoreOrigin(repr(self), 0, catalog.fingerprint))
