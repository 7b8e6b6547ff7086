"""Sites, options and evidence made by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Place, Site


@pytest.fixture
def site_of() -> Callable[..., Site]:
    """The site of a lone Linear, Conv2d or norm."""

    def make(host: nn.Module, rows: tuple[int, int] | None = None) -> Site:
        kinds = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.LayerNorm: "layer_norm", nn.BatchNorm2d: "batch_norm"}
        kind = next(name for cls, name in kinds.items() if isinstance(host, cls))
        shape = tuple(host.weight.shape)
        if rows is not None:
            shape = (rows[1] - rows[0], *shape[1:])
        bias = host.bias is not None
        return Site(
            name="host",
            module="",
            kind=kind,
            shape=shape,
            has_bias=bias,
            depth=0,
            role="other",
            slots=("weight", "bias", "output") if bias else ("weight", "output"),
            rows=rows,
            groups=getattr(host, "groups", 1),
            channel_axis=1 if kind in ("conv2d", "batch_norm") else -1,
        )

    return make


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """The adapter of one size on a lone host."""

    def make(method: Method, site: Site, host: nn.Module, size: int, indices: list[int] | None = None) -> nn.Module:
        chosen = None if indices is None else Indices(np.array(indices, dtype=np.int64))
        places = tuple(Place(site.name, slot) for slot in sorted(method.slots(site)))
        option = Option(site.name, "m", size, method.cost(site, size), 0.0, places, chosen)
        return method.build(site, option, host, torch.Generator().manual_seed(0))

    return make


@pytest.fixture
def evidence_of() -> Callable[..., Evidence]:
    """Evidence with a signal per slot; the score is its square unless given."""

    def make(
        site: Site, values: dict[str, Tensor], signals: dict[str, Tensor], score: Tensor | None = None
    ) -> Evidence:
        return Evidence(
            site,
            {s: TensorEvidence(values[s], g, g.square() if score is None else score) for s, g in signals.items()},
        )

    return make
