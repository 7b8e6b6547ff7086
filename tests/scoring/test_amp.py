"""Scoring with the forward pass under autocast to bfloat16."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.scores import Scores
from autopeft.errors import UsageError
from autopeft.models.scan import scan
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask


class Watching(ToyTask):
    """Remembers the types that layers compute in, and the precision of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[torch.dtype] = set()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
        hook = linear.register_forward_hook(lambda module, inputs, output: self.kinds.add(output.dtype))
        losses = super().losses(model, batch)
        hook.remove()
        assert losses.dtype == torch.float32
        return losses


def vectors(scores: Scores, field: str) -> Tensor:
    return torch.cat([getattr(t, field).flatten() for e in scores.evidence.values() for t in e.slots.values()])


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnet])
@pytest.mark.parametrize("mode", ["per_batch", "per_sample"])
def test_close_to_full_precision_and_kept_in_float32(make: Any, mode: Any) -> None:
    settings = Gradient(mode=mode, batch_size=4, halves=True)
    model, task = make(), Watching()
    catalog = scan(model)
    full = settings.score(model, catalog, task)
    assert task.kinds == {torch.float32}
    task.kinds.clear()
    low = dataclasses.replace(settings, amp="bf16").score(model, catalog, task)
    assert torch.bfloat16 in task.kinds
    assert not torch.is_autocast_enabled("cpu")
    for field in ("signal", "score", "half_a", "half_c"):
        one, two = vectors(full, field), vectors(low, field)
        assert two.dtype == torch.float32
        assert not torch.equal(one, two)
        # Eight significant bits per factor.
        assert float((one - two).norm() / one.norm()) < 0.03
    assert float(torch.cosine_similarity(vectors(full, "score"), vectors(low, "score"), dim=0)) > 0.999


def test_formulas_are_used_all_the_same() -> None:
    """What is exact is found out in full precision, so that no layer falls back to a pass per sample."""
    model = tiny_vit()
    catalog = scan(model)
    calls = []
    for amp in ("off", "bf16"):
        count = 0

        class Counting(ToyTask):
            def losses(self, model: nn.Module, batch: Any) -> Tensor:
                nonlocal count
                count += 1
                return super().losses(model, batch)

        Gradient(mode="per_sample", batch_size=16, amp=amp).score(model, catalog, Counting())  # type: ignore[arg-type]
        calls.append(count)
    assert calls[0] == calls[1] < 32


def test_a_caller_s_autocast_is_left_alone() -> None:
    task = Watching()
    model = tiny_vit()
    catalog = scan(model)
    with torch.autocast("cpu", torch.bfloat16):
        Gradient(max_batches=1).score(model, catalog, task)
        assert torch.is_autocast_enabled("cpu")
    assert task.kinds == {torch.bfloat16}


def test_the_origin_tells_the_precision() -> None:
    model = tiny_vit()
    catalog, task = scan(model), ToyTask()
    for make in (lambda g: g, Fisher):
        full, low = (
            make(Gradient(max_batches=1, amp=amp)).score(model, catalog, task).origin for amp in ("off", "bf16")
        )
        assert full.scorer != low.scorer
        assert "amp='bf16'" in low.scorer


def test_unknown_precision() -> None:
    with pytest.raises(UsageError, match=r"gradient\.amp must be one of off, bf16, got 'fp16'"):
        Gradient(amp="fp16")  # type: ignore[arg-type]
