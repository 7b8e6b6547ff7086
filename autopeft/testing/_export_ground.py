"""A small timm model with trained adapters in it, for tests of exporters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Inserted, Method
from autopeft.core.menu import Indices, Option
from autopeft.core.record import Record
from autopeft.core.site import Catalog
from autopeft.methods.bias import Bias
from autopeft.methods.bottleneck import BottleneckAdapter
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF
from autopeft.models.scan import scan

__all__ = ["METHODS", "ExportGround", "small_vit"]

METHODS: Mapping[str, Method] = {
    "lora": LoRA(),
    "core": Core(),
    "sparse": Sparse(slot="weight"),
    "bias": Bias(),
    "norm": Norm(),
    "ssf": SSF(),
    "adapter": BottleneckAdapter(),
}
_CLASSES = ("ant", "bee", "cat", "dog")
_SPREAD = 0.3
"""Standard deviation of the trained state: far enough from the start that nothing passes by being forgotten."""


@dataclass(frozen=True, slots=True, eq=False)
class ExportGround:
    """A model, its catalogue and a record, and the means to borrow the model with a trained plan.

    Attributes:
        model: a plain timm model in evaluation mode.
        catalog: its sites.
        record: as a run would make it.
        images: four images.
        backend: what inserts.
    """

    model: nn.Module
    catalog: Catalog
    record: Record
    images: Tensor
    backend: Native = field(default_factory=Native)

    def option(self, site: str, key: str, size: int = 1) -> Option:
        """An option of a method of `METHODS`; sparse ones train the first entries with a stride of three."""
        found, method = self.catalog[site], METHODS[key]
        places = tuple(sorted(self.catalog.places(found, method.slots(found))))
        indices = Indices(np.arange(size, dtype=np.int64) * 3) if key == "sparse" else None
        return Option(site, key, size, method.cost(found, size), 1.0, places, indices)

    @contextmanager
    def borrowed(self, options: Sequence[Option], *, trained: bool = True) -> Iterator[Inserted]:
        """The model with these options in it, every trained tensor random and the classifier too."""
        allocation = Allocation(tuple(options), Budget(10**9))
        with self.backend.insert(self.model, self.catalog, allocation, METHODS) as inserted:
            if trained:
                generator = torch.Generator().manual_seed(1)
                state = inserted.state()
                for name in sorted(state):
                    if not name.startswith("buffer/"):
                        state[name] = _SPREAD * torch.randn(state[name].shape, generator=generator)
                inserted.load_state(state)
            yield inserted

    def logits(self, inserted: Inserted) -> Tensor:
        """What the borrowed model gives for the images."""
        with torch.no_grad():
            found: Tensor = inserted.model(self.images)
        return found


def small_vit(architecture: str = "vit_tiny_patch16_224", size: int = 28, **arguments: Any) -> ExportGround:
    """A timm vision transformer of 2 blocks of width 32 with random weights, or another small model of timm.

    Args:
        architecture: timm's name.
        size: height and width of the images.
        arguments: arguments of the model; those of the small transformer when none are given and none are needed.
    """
    if architecture == "vit_tiny_patch16_224" and not arguments:
        arguments = {"img_size": size, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=len(_CLASSES), **arguments).eval()
        images = torch.randn(4, 3, size, size)
    catalog = scan(model, images[:1])
    data_config = {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    facts = {
        "name": "bundled:small",
        "spec": "bundled:small",
        "architecture": architecture,
        "model_args": arguments,
        "pretrained_tag": "",
        "data_config": data_config,
        "n_base": catalog.n_base,
        "n_head": catalog.n_head,
        "fingerprint": catalog.fingerprint,
        "weights_hash": "0" * 64,
    }
    data = {"spec": "toy", "classes": list(_CLASSES), "sizes": {"inner": 8}, "data_hash": "f" * 16}
    budget = {"limit": 10**9, "unit": "trainable", "text": "", "share_of": None}
    return ExportGround(model, catalog, Record("run", {}, facts, data, budget, (), -1), images)
