"""The backend that brings Hugging Face PEFT in: starts from data, common ranks, native methods in its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from autopeft.backends._inserted import NativeInserted
from autopeft.backends._peft_ranks import RankPool
from autopeft.backends._peft_starts import start_from_activations, start_from_gradients
from autopeft.backends._peft_twins import Twin, has_twin
from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Method, Task
from autopeft.core.site import Catalog
from autopeft.methods.hf_peft import HfPeft
from autopeft.methods.peft_adapter import PeftAdapter

__all__ = ["HfPeftBackend", "HfPeftInserted"]


class HfPeftInserted(NativeInserted):
    """What `HfPeftBackend.insert` yields: adapters of PEFT may look at the data and at each other."""

    def _of(self, tuner: str, init: str = "") -> list[PeftAdapter]:
        found = [part for part in self._parts.values() if isinstance(part, PeftAdapter)]
        return [a for a in found if a.tuner == tuner or (init and a.settings.get("init_lora_weights") == init)]

    def join(self) -> None:
        """Give the adapters of each AdaLoRA method one budget of ranks."""
        self._pools: list[RankPool] = []
        for method in dict.fromkeys(option.method for option in self._allocation):
            parts = [self._parts[option.key] for option in self._allocation if option.method == method]
            adapters = [part for part in parts if isinstance(part, PeftAdapter) and part.tuner == "adalora"]
            if adapters:
                self._pools.append(RankPool(adapters))

    def prepare(self, task: Task, seed: int) -> None:
        """Start EVA from the inputs of its layers and LoRA-GA from their gradients, on the inner split."""
        super().prepare(task, seed)
        for tuner, start in (("eva", start_from_activations), ("lora_ga", start_from_gradients)):
            adapters = {a.site.module: a for a in self._of(tuner, tuner)}
            if adapters:
                start(self, adapters, task, seed)

    def advance(self, step: int, total: int) -> list[nn.Parameter]:
        """Cut AdaLoRA's ranks as the schedule says, then tell every part."""
        for pool in self._pools:
            pool.advance(step, total)
        return super().advance(step, total)

    def penalty(self) -> Tensor | None:
        """The parts' own terms, and AdaLoRA's orthogonality."""
        total = super().penalty()
        for pool in self._pools:
            term = pool.penalty().float()
            total = term if total is None else total + term
        return total


@dataclass(frozen=True, slots=True)
class HfPeftBackend(Native):
    """Runs PEFT's layers where they belong and everything else as the native backend does.

    Options of the method `peft` run in every backend; three of them need this one: `eva` and `lora_ga` start from the
    training data before the first step, and `adalora` shares one budget of ranks among its sites. LoRA, DoRA, sparse
    weights and SSF of the house run through PEFT's layers too, with the native adapter's own tensors and names, so
    that a plan, a checkpoint and an export of one backend are those of the other. Native methods that PEFT lacks act
    outside of its layers on the same host: first PEFT's layer, then branches, then output maps; merging keeps the
    order. PEFT builds its layers on stand-ins of the hosts, so that the borrowed model keeps its modules and names.

    Attributes:
        train_batch_norm: as in `Native`.
        base_dropout: as in `Native`.
        translate: run native methods through PEFT where it computes exactly the same.
    """

    translate: bool = True

    yields: ClassVar[type[NativeInserted]] = HfPeftInserted

    @contextmanager
    def insert(
        self,
        model: nn.Module,
        catalog: Catalog,
        allocation: Allocation,
        methods: Mapping[str, Method],
        seed: int = 0,
        head: Mapping[str, Tensor] | None = None,
    ) -> Iterator[NativeInserted]:
        """Borrow the model; see `autopeft.core.contracts.Backend.insert`."""
        if self.translate:
            methods = self._translated(model, catalog, allocation, methods)
        with Native.insert(self, model, catalog, allocation, methods, seed, head) as inserted:
            assert isinstance(inserted, HfPeftInserted)
            inserted.join()
            yield inserted

    def _translated(
        self, model: nn.Module, catalog: Catalog, allocation: Allocation, methods: Mapping[str, Method]
    ) -> dict[str, Method]:
        """The methods, those with twins in PEFT replaced; one of PEFT's layers per host, weights before outputs."""
        modules = dict(model.named_modules())
        taken: set[str] = set()
        chosen: dict[str, set[str]] = {}
        for option in allocation:
            if isinstance(methods.get(option.method), HfPeft):
                site = catalog[option.site]
                weights = {place.site for place in option.places if place.slot == "weight"}
                taken |= {member.module for member in (site.members or (site,)) if member.name in weights}
        for option in sorted(allocation, key=lambda o: [place.slot == "output" for place in o.places]):
            method, site = methods.get(option.method), catalog[option.site]
            host = modules.get(site.module)
            if method is None or host is None or site.module in taken:
                continue
            if has_twin(method, site, option.size, host):
                taken.add(site.module)
                chosen.setdefault(option.method, set()).add(site.name)
        return {
            key: Twin(method, frozenset(chosen[key])) if key in chosen else method for key, method in methods.items()
        }
