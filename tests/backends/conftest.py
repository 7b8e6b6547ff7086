"""Plans made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Catalog
from autopeft.methods.bias import Bias
from autopeft.methods.block_adapter import BlockAdapter
from autopeft.methods.bottleneck import BottleneckAdapter
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF
from autopeft.methods.tokens import Tokens
from autopeft.methods.vector import Vector


@pytest.fixture
def methods() -> dict[str, Method]:
    return {
        "lora": LoRA(),
        "core": Core(),
        "sparse": Sparse(),
        "sparse_bias": Sparse(slot="bias"),
        "bias": Bias(),
        "vector": Vector(),
        "norm": Norm(),
        "ssf": SSF(),
        "adapter": BottleneckAdapter(),
        "block_adapter": BlockAdapter(),
        "tokens": Tokens(),
    }


@pytest.fixture
def plan(methods: dict[str, Method]) -> Callable[..., Allocation]:
    """The allocation of (site, method, size) triples; sparse ones train the first entries."""

    def make(catalog: Catalog, *choices: tuple[str, str, int], **changes: object) -> Allocation:
        options = []
        for name, key, size in choices:
            site, method = catalog[name], methods[key]
            slots = method.slots(site) or ("weight",)
            places = tuple(sorted(catalog.places(site, slots)))
            indices = Indices(np.arange(size, dtype=np.int64)) if key.startswith("sparse") else None
            cost = method.cost(site, size)
            options.append(dataclasses.replace(Option(name, key, size, cost, 0.0, places, indices), **changes))
        return Allocation(tuple(options), Budget(10**9))

    return make
