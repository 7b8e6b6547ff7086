"""Noise: a control that looks at nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.scores import ScoreOrigin, Scores
from autopeft.core.site import Catalog
from autopeft.scoring._hosts import Hosts, Known, assemble

__all__ = ["Random"]


@dataclass(frozen=True, slots=True)
class Random:
    """Unit Gaussian noise as the signal of every entry, its square as the score.

    A control for every other scorer: what is left of a result when the scores know nothing. Each tensor draws from a
    stream of its own, named by the seed and the tensor's name, so that the order of the sites does not matter.

    Attributes:
        seed: added to the seed that `score` is given.
    """

    seed: int = 0

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every tensor of the catalogue; neither the weights nor the task are looked at.

        Raises:
            UsageError: when the catalogue is of another model.
        """
        hosts = Hosts(model, catalog)
        known = {key: self._noise(key, seed, p.shape, p.dtype) for key, p in hosts.parameters.items()}
        for site in hosts.blocks:
            square = torch.Size((site.shape[0], site.shape[0]))
            known[site.name] = self._noise(site.name, seed, square, torch.float32)
        return assemble(catalog, hosts, known, ScoreOrigin(repr(self), 0, catalog.fingerprint))

    def _noise(self, name: str, seed: int, shape: torch.Size, dtype: torch.dtype) -> Known:
        stream = hashlib.sha256(f"{self.seed + seed}/{name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(stream, "big"))
        dtype = torch.promote_types(dtype, torch.float32)
        signal: Tensor = torch.randn(shape, generator=generator, dtype=dtype)
        return Known(signal, signal.square())
