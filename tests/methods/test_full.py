from __future__ import annotations

import pytest
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.site import Site
from autopeft.methods.full import Full
from autopeft.methods.lora import LoRA
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return Full()


@pytest.mark.parametrize(
    ("host", "trained"),
    [(nn.Linear(5, 6), 36), (nn.Linear(5, 6, bias=False), 30), (nn.Conv2d(4, 6, 3), 222), (nn.LayerNorm(6), 12)],
)
def test_every_entry_is_paid_for(site_of, host: nn.Module, trained: int) -> None:
    cost = Full().cost(site_of(host), 1)
    assert (cost.trainable, cost.entries) == (trained, trained) == (sum(p.numel() for p in host.parameters()),) * 2


def test_a_step_is_the_step_of_full_fine_tuning(site_of, build) -> None:
    host = nn.Linear(4, 3).double()
    site: Site = site_of(host)
    x = torch.randn(7, 4, dtype=torch.float64)
    adapter = build(Full(), site, host, 1)
    merged = adapter.merge(dict(host.named_parameters()))
    torch.func.functional_call(host, merged, (x,)).sin().sum().backward()
    change = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    host.zero_grad()
    host(x).sin().sum().backward()
    assert all(torch.equal(change[name], p.grad) for name, p in host.named_parameters())
    assert adapter.rate_roles == {"weight": "dense"}


def test_no_other_method_captures_more(site_of, evidence_of) -> None:
    host = nn.Linear(6, 5)
    site = site_of(host)
    known = evidence_of(
        site,
        {"weight": host.weight.detach(), "bias": host.bias.detach()},
        {"weight": torch.randn(5, 6), "bias": torch.randn(5)},
    )
    (whole,) = Full().gains(site, known, (1,))
    (most,) = LoRA().gains(site, known, (5,))
    bias = float(known["bias"].signal.square().sum())
    assert whole == pytest.approx(most + bias)
