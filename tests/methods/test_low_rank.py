"""Where a low-rank change runs beside its host, and where the host runs with its changed weight."""

from __future__ import annotations

import pytest
from torch import nn

from autopeft.core.contracts import Method
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.pego import PEGO


@pytest.mark.parametrize("method", [LoRA(), Core(), PEGO()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("host", "form"),
    [
        (nn.Linear(32, 32), "branch"),
        (nn.Conv2d(8, 8, 3), "branch"),
        (nn.Conv2d(8, 8, 3, groups=8), "swap"),
        (nn.Conv2d(8, 8, 3, padding_mode="reflect"), "swap"),
    ],
    ids=["linear", "conv", "depthwise", "reflected"],
)
def test_convolutions_in_groups_run_with_their_changed_weight(
    site_of, build, method: Method, host: nn.Module, form: str
) -> None:
    """In a depthwise convolution a branch of rank r would be r depthwise convolutions and more."""
    assert build(method, site_of(host), host, 1).form == form
