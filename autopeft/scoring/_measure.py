"""One scoring pass over the data: what the gradient and Fisher scorers have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.scores import ScoreOrigin
from autopeft.core.site import Catalog
from autopeft.errors import DataError, UsageError
from autopeft.scoring._batches import portions
from autopeft.scoring._hooks import forward_in
from autopeft.scoring._hosts import Hosts, Known
from autopeft.scoring._moments import Make, Moments, plain_sums
from autopeft.scoring._per_sample import PerSample
from autopeft.scoring._ranks import Ranks
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


def measure(
    settings: Gradient,
    model: nn.Module,
    catalog: Catalog,
    task: Task,
    seed: int,
    make: Make = plain_sums,
    around: Callable[[int], contextlib.AbstractContextManager[None]] | None = None,
) -> Measured:
    """Moments of the gradient of every tensor of a catalogue over the inner split.

    Where a process group exists, its ranks share the batches and all of them get the same sums.

    Args:
        settings: what is looked at, and how.
        model: the model.
        catalog: its catalogue.
        task: the task.
        seed: of the order and augmentation of the samples.
        make: makes the sums of a tensor. Other sums than the plain ones depend on whole batches in their order, so
            they are for mode `per_batch` and a single process.
        around: what the forward pass of a batch, by its number, runs in; mode `per_batch` alone.

    Raises:
        AutopeftError: when another rank failed.
        DataError: when there is no batch to look at.
        Diverged: when a loss is not finite.
        UsageError: when the catalogue is not of this model, the model uses reentrant checkpointing, or ranks were not
            given the same.
    """
    start = time.perf_counter()
    # A sample by itself is a batch of one: the same gradients, without the machinery.
    whole = settings.mode == "per_batch" or settings.batch_size == 1
    hosts = Hosts(model, catalog)
    blocks = {s.name: (s, model.get_submodule(s.module)) for s in hosts.blocks} if settings.blocks else {}
    moments: dict[str, Moments] = {}
    samples, units = [0, 0], 0
    like = next(iter(hosts.parameters.values()))
    ranks = Ranks(like.device)
    surrounded = around or (lambda number: contextlib.nullcontext())
    if make is not plain_sums and (ranks.number > 1 or not whole):
        raise UsageError(
            f"this scorer follows the gradients of whole batches in one process; it was given mode {settings.mode!r} "
            f"and {ranks.number} ranks. Use gradient.mode=per_batch, and score before the ranks start"
        )
    with borrowed(model, hosts.parameters.values()), torch.enable_grad():

        def work() -> float:
            nonlocal units
            streaming = Streaming(hosts.parameters, blocks, moments, settings.halves, make)
            per_sample = PerSample(model, catalog, hosts, blocks, moments, settings)
            with contextlib.ExitStack() as stack:
                if whole:
                    stack.enter_context(streaming.attached())
                for number, (batch, n, half) in enumerate(portions(task, settings, seed)):
                    if not ranks.mine(number):
                        if not whole:
                            per_sample.decide(task, batch, n)
                        continue
                    samples[half] += n
                    units += 1 if whole else n
                    if whole:

                        def loss(batch: object = batch, number: int = number) -> Tensor:
                            with forward_in(settings.amp, like.device), surrounded(number):
                                return task.loss(model, batch)

                        streaming.step(loss, n, half)
                    else:
                        per_sample.step(task, batch, n, half)
            return time.perf_counter() - start

        seconds = ranks.together(work, f"{settings!r} {catalog.fingerprint} {task.data_hash} {seed}")
        *samples, units = ranks.sums([*samples, units])
        if not samples[0] or (settings.halves and not samples[1]):
            raise DataError(f"the inner split gave {sum(samples)} samples, too few batches to score")
        known: dict[str, Known] = {}
        for key in (*hosts.parameters, *blocks):
            if key not in moments:
                parameter = hosts.parameters.get(key)
                n_channels = blocks[key][0].shape[0] if parameter is None else 0
                shape = torch.Size((n_channels, n_channels)) if parameter is None else parameter.shape
                moments[key] = make(key, shape, like if parameter is None else parameter, settings.halves)
            elif key in blocks and ranks.number > 1:
                moments[key].to(like)
            found = moments.pop(key)
            for tensor in (*found.first, found.second):
                ranks.add_up(tensor)
            known[key] = found.known((samples[0], samples[1]))
    if ranks.number == 1:
        seconds = time.perf_counter() - start
    return Measured(hosts, known, sum(samples), units, seconds)
