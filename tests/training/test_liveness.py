from __future__ import annotations

import pytest
import torch
from torch import nn

from autopeft.errors import DeadAdapter
from autopeft.training.liveness import Liveness


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))


def test_lora_lives_though_a_has_no_gradient_at_first() -> None:
    lora = Lora()
    (3 * lora.a * lora.b).sum().backward()
    assert lora.a.grad is not None
    assert lora.a.grad.item() == 0.0
    watch = Liveness({"x/lora": lora})
    assert not watch.done
    watch.after_backward()
    assert watch.done
    watch.at_epoch_end()


def test_a_missing_gradient_is_named_at_the_first_step() -> None:
    alive, dead = Lora(), Lora()
    (alive.a * alive.b + dead.a).sum().backward()
    with pytest.raises(DeadAdapter, match="the adapter y/lora received no gradient"):
        Liveness({"x/lora": alive, "y/lora": dead}).after_backward()


def test_zero_at_every_step_is_dead_but_one_step_proves_nothing() -> None:
    lora = Lora()
    (lora.a * 0 + lora.b * 0).sum().backward()
    watch = Liveness({"x/lora": lora})
    watch.after_backward()
    watch.at_epoch_end()
    watch.after_backward()
    with pytest.raises(DeadAdapter, match="x/lora had a gradient of exactly zero in each of 2 steps"):
        watch.at_epoch_end()


def test_a_late_gradient_is_alive() -> None:
    lora = Lora()
    (lora.a * 0 + lora.b * 0).sum().backward()
    watch = Liveness({"x/lora": lora})
    for _ in range(3):
        watch.after_backward()
    lora.b.grad = torch.ones(1)
    watch.after_backward()
    watch.at_epoch_end()
    assert watch.done


def test_many_dead_adapters_are_counted() -> None:
    with pytest.raises(DeadAdapter, match=r"7 adapters: s0, s1, s2, s3, s4, \.\.\. received"):
        Liveness({f"s{i}": Lora() for i in range(7)}).after_backward()
