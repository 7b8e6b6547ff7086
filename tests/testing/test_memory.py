from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from autopeft.testing.memory import LiveBytes

KB = 256
"""float32 scalars of a kilobyte."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_and_peak_by_hand(device: str) -> None:
    held = torch.zeros(KB, device=device)
    with LiveBytes([held, held.view(2, -1)]) as bytes_:
        assert bytes_.live == 1024
        a = torch.ones(2 * KB, device=device)
        b = a.view(2, KB)[1]
        assert bytes_.live == 3 * 1024
        c = a + 1
        del a
        assert bytes_.live == 5 * 1024, "a view keeps its storage alive"
        del b, c
        assert (bytes_.live, bytes_.peak) == (1024, 5 * 1024)
        bytes_.reset()
        assert bytes_.peak == 1024
        held += 1
        assert bytes_.peak == 1024, "in place nothing is new"
        kept = torch.ones(KB, device=device)
    del kept
    assert (bytes_.live, bytes_.peak) == (1024, 2048)


def test_what_the_graph_keeps_is_counted_and_freed() -> None:
    x = torch.ones(KB, requires_grad=True)
    with LiveBytes() as bytes_:
        y = (x.exp() * 2).sum()
        assert bytes_.live >= 1024, "exp keeps its result"
        y.backward()
        del y
        gc.collect()
        assert bytes_.live == 1024, "the gradient is left"


def test_backward_is_seen() -> None:
    layer = nn.Linear(16, 16, bias=False)
    x = torch.ones(64, 16)
    with LiveBytes() as bytes_:
        loss = layer(x).square().sum()
        assert bytes_.live < 2 * 4 * 64 * 16
        bytes_.reset()
        loss.backward()
    assert bytes_.peak >= 2 * 4 * 64 * 16, "the output and its gradient"


def test_an_address_used_again_is_counted_again() -> None:
    with LiveBytes() as bytes_:
        for _ in range(50):
            torch.empty(KB)
        assert bytes_.live == 0
        assert bytes_.peak == 1024
