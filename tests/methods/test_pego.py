from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods import _l1
from autopeft.methods.pego import PEGO
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return PEGO(members=1, strength=0.0)


def brute_force(weight: Tensor, downs: list[Tensor], ups: list[Tensor]) -> Tensor:
    deltas = [b @ a for a, b in zip(downs, ups, strict=True)]
    total = sum((weight @ d.T).abs().sum() for d in deltas)
    for i, one in enumerate(deltas):
        for other in deltas[i + 1 :]:
            total = total + (one @ other.T).abs().sum()
    return total


@pytest.mark.parametrize("chunk", [1 << 22, 30])
def test_penalty_and_its_gradient(site_of, build, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(_l1, "_CHUNK", chunk)
    host = nn.Linear(40, 24).double()
    adapter = build(PEGO(members=3, strength=0.5), site_of(host, (3, 20)), host, 2)
    nn.init.normal_(adapter.B)
    value = adapter.penalty()
    value.backward()
    a, b = (p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B))
    oracle = 0.5 * brute_force(host.weight[3:20].detach(), list(a.split(2)), list(b.split(2, dim=1)))
    oracle.backward()
    torch.testing.assert_close(value, oracle)
    torch.testing.assert_close(adapter.A.grad, a.grad)
    torch.testing.assert_close(adapter.B.grad, b.grad)


def test_hand_worked_penalty(site_of, build) -> None:
    host = nn.Linear(16, 16)
    nn.init.zeros_(host.weight)
    with torch.no_grad():
        host.weight[0, 0], host.weight[1, 1] = 2.0, 5.0
    adapter = build(PEGO(members=2, strength=1.0), site_of(host), host, 1)
    with torch.no_grad():
        adapter.A.zero_()
        adapter.B.zero_()
        adapter.A[0, 0], adapter.B[3, 0] = 1.0, -1.0  # first member: entry (3, 0) is -1
        adapter.A[1, 0], adapter.A[1, 1], adapter.B[4, 1] = 1.0, 1.0, 1.0  # second: (4, 0) and (4, 1) are 1
    # The weight times the members: 2 and 2 + 5. The members' product: 1.
    assert adapter.penalty().item() == 2 + 7 + 1


def test_members_add_up(site_of, build) -> None:
    host = nn.Linear(12, 20).double()
    adapter = build(PEGO(members=2), site_of(host), host, 1)
    nn.init.normal_(adapter.B)
    members = sum(adapter.B[:, [i]] @ adapter.A[[i]] for i in range(2))
    torch.testing.assert_close(adapter.delta()["weight"], members)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(adapter.branch(x), x @ members.T)


def test_penalty_is_zero_at_the_start_and_absent_without_strength(site_of, build) -> None:
    host = nn.Conv2d(8, 16, 3)
    site = site_of(host)
    adapter = build(PEGO(), site, host, 1)
    assert float(adapter.penalty().detach()) == 0.0
    assert build(PEGO(strength=0.0), site, host, 1).penalty() is None


def test_weight_is_neither_copied_nor_saved(site_of, build) -> None:
    host = nn.Linear(40, 24)
    adapter = build(PEGO(), site_of(host), host, 1)
    assert adapter.frozen.data_ptr() == host.weight.data_ptr()
    assert not adapter.frozen.requires_grad
    assert set(adapter.state_dict()) == {"A", "B"}


def test_gains_take_all_members_together(site_of, evidence_of) -> None:
    site = site_of(nn.Linear(30, 30))
    known = evidence_of(site, {"weight": torch.zeros(30, 30)}, {"weight": torch.diag(torch.arange(30.0))})
    squares = [float(i * i) for i in range(29, -1, -1)]
    assert PEGO(members=4).gains(site, known, (1, 2)) == pytest.approx((sum(squares[:4]), sum(squares[:8])))


@pytest.mark.parametrize("fields", [{"members": 0}, {"strength": -1.0}, {"strength": float("inf")}])
def test_bad_fields(fields: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        PEGO(**fields)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates("slices") if s.role in ("attn.q", "attn.v")]
    assert sum(PEGO().cost(s, 4).trainable for s in sites) == 589_824
