from __future__ import annotations

import torch

from autopeft.core.site import Place
from autopeft.models.scan import scan
from autopeft.scoring.magnitude import Magnitude
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask


def test_squared_values() -> None:
    model = tiny_vit()
    scores = Magnitude().score(model, scan(model), ToyTask())
    weight = model.blocks[0].attn.qkv.weight.detach()
    found = scores.evidence["blocks.0.attn.qkv[k]"]["weight"]
    assert torch.equal(found.signal, weight[16:32])
    assert torch.equal(found.score, weight[16:32] ** 2)
    assert scores.totals[Place("blocks.0", "output")] == 0
    assert scores.evidence["blocks.0"]["output"].signal.shape == (16, 16)


def test_the_signal_is_a_copy() -> None:
    model = tiny_vit()
    scores = Magnitude().score(model, scan(model), ToyTask())
    scores.evidence["norm"]["weight"].signal.zero_()
    assert model.norm.weight.abs().min() > 0
