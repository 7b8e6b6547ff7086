"""One scoring pass over the data: what the gradient and Fisher scorers have in common."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from autopeft.core.contracts import Task
from autopeft.core.scores import ScoreOrigin
from autopeft.core.site import Catalog
from autopeft.errors import DataError
from autopeft.scoring._batches import portions
from autopeft.scoring._hosts import Hosts, Known
from autopeft.scoring._moments import Moments
from autopeft.scoring._per_sample import PerSample
from autopeft.scoring._streaming import Streaming
from autopeft.scoring.borrow import borrowed

if TYPE_CHECKING:
    from autopeft.scoring.gradient import Gradient

__all__ = ["Measured", "measure"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a pass found out.

    Attributes:
        hosts: the tensors of the catalogue.
        known: per key of `hosts.parameters`, and per name of a block's site.
        samples: samples that were looked at.
        units: gradients that were squared: batches, or samples.
        seconds: wall time of the pass.
    """

    hosts: Hosts
    known: dict[str, Known]
    samples: int
    units: int
    seconds: float

    def origin(self, scorer: object, catalog: Catalog, task: Task) -> ScoreOrigin:
        """Where the scores come from; hashes of weights and head are the caller's to add."""
        return ScoreOrigin(
            scorer=repr(scorer),
            n_samples=self.samples,
            catalog=catalog.fingerprint,
            data=task.data_hash,
            seconds=round(self.seconds, 3),
        )


def measure(settings: Gradient, model: nn.Module, catalog: Catalog, task: Task, seed: int) -> Measured:
    """Moments of the gradient of every tensor of a catalogue over the inner split.

    Raises:
        DataError: when there is no batch to look at.
        Diverged: when a loss is not finite.
        UsageError: when the catalogue is not of this model, or the model uses reentrant checkpointing.
    """
    start = time.perf_counter()
    hosts = Hosts(model, catalog)
    blocks = {s.name: (s, model.get_submodule(s.module)) for s in hosts.blocks} if settings.blocks else {}
    moments: dict[str, Moments] = {}
    samples, units = [0, 0], 0
    # A sample by itself is a batch of one: the same gradients, without the machinery.
    whole = settings.mode == "per_batch" or settings.batch_size == 1
    with borrowed(model, hosts.parameters.values()), torch.enable_grad(), contextlib.ExitStack() as stack:
        streaming = Streaming(hosts.parameters, blocks, moments, settings.halves)
        per_sample = PerSample(model, catalog, hosts, blocks, moments, settings)
        if whole:
            stack.enter_context(streaming.attached())
        for batch, n, half in portions(task, settings, seed):
            samples[half] += n
            units += 1 if whole else n
            if whole:
                streaming.step(lambda batch=batch: task.loss(model, batch), n, half)  # type: ignore[misc]
            else:
                per_sample.step(task, batch, n, half)
        if not samples[0] or (settings.halves and not samples[1]):
            raise DataError(f"the inner split gave {sum(samples)} samples, too few batches to score")
        like = next(iter(hosts.parameters.values()))
        known: dict[str, Known] = {}
        for key in (*hosts.parameters, *blocks):
            if key not in moments:
                parameter = hosts.parameters.get(key)
                n_channels = blocks[key][0].shape[0] if parameter is None else 0
                shape = torch.Size((n_channels, n_channels)) if parameter is None else parameter.shape
                moments[key] = Moments(shape, like if parameter is None else parameter, settings.halves)
            known[key] = moments.pop(key).known((samples[0], samples[1]))
    return Measured(hosts, known, sum(samples), units, time.perf_counter() - start)
