from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods._quantiser import Quantiser
from autopeft.methods.bit_lora import BitLoRA
from autopeft.methods.lora import LoRA
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestOneBit(MethodLaws):
    identity = False

    def make(self) -> Method:
        return BitLoRA()


class TestThreeBitsAndDropout(MethodLaws):
    identity = False
    dtypes = (torch.float32,)

    def make(self) -> Method:
        return BitLoRA(bits=3, scale=2.0, dropout=0.1)


def test_hand_worked_change(site_of, build) -> None:
    host = nn.Linear(4, 4)
    adapter = build(BitLoRA(scale=10.0), site_of(host), host, 1)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[1.0, 1, -1, -1]]))
        adapter.B.copy_(torch.tensor([[3.0], [1], [1], [3]]))
    # A: mean 0, deviation 1. B: mean 2, deviation 1. The codes of 1 bit are -c and c.
    c = 0.6744898
    wanted = 10 * torch.outer(torch.tensor([2 + c, 2 - c, 2 - c, 2 + c]), torch.tensor([c, c, -c, -c]))
    torch.testing.assert_close(adapter.delta()["weight"], wanted)
    torch.testing.assert_close(adapter.branch(torch.tensor([1.0, 0, 0, 0])), wanted[:, 0])
    down, up = adapter.low_rank()
    torch.testing.assert_close(up @ down, wanted)


@pytest.mark.parametrize("groups", [1, 8])
def test_convolution_branch_is_the_dense_change(site_of, build, groups: int) -> None:
    host = nn.Conv2d(8, 16, 3, groups=groups, padding=1).double()
    adapter = build(BitLoRA(bits=2), site_of(host), host, 2)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    dense = adapter.delta()["weight"]
    torch.testing.assert_close(adapter.branch(x), F.conv2d(x, dense, None, 1, 1, 1, groups))


def test_it_starts_near_the_model(site_of, build) -> None:
    host = nn.Linear(64, 64)
    adapter = build(BitLoRA(), site_of(host), host, 8)
    assert 0 < adapter.delta()["weight"].abs().max() < 0.01
    assert 5e-4 < adapter.B.detach().std() < 1e-3
    assert adapter.B.detach().abs().max() <= 2e-3


def test_dropout_in_training_alone(site_of, build) -> None:
    host = nn.Linear(32, 32)
    adapter = build(BitLoRA(dropout=0.5), site_of(host), host, 8)
    x = torch.randn(4, 32)
    assert torch.equal(adapter.eval().branch(x), adapter.branch(x))
    assert not torch.equal(adapter.train().branch(x), adapter.branch(x))


def test_gains_are_loras_times_what_codes_keep(site_of, evidence_of) -> None:
    host = nn.Linear(256, 256)
    site = site_of(host)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(256, generator=generator) for _ in range(2))
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": torch.outer(u, v)})
    full = LoRA().gains(site, known, (1,))[0]
    ends = {}
    for bits in (1, 2, 4, 8):
        (ends[bits],) = BitLoRA(bits=bits).gains(site, known, (1,))
        # The best rank-1 step with its factors in codes, projected on the signal.
        step = torch.outer(*(_coded(t, bits) for t in (u, v))).double()
        signal = torch.outer(u, v).double()
        measured = float((step * signal).sum() ** 2 / step.square().sum())
        assert ends[bits] == pytest.approx(measured, rel=0.1)
    assert ends[1] == pytest.approx(full * (2 / torch.pi) ** 2)
    assert list(ends.values()) == sorted(ends.values())
    assert ends[8] < full


def _coded(vector: torch.Tensor, bits: int) -> torch.Tensor:
    return Quantiser(bits)("v", vector)


def test_counts_on_a_vit_base() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates("slices") if s.role in ("attn.q", "attn.v")]
    assert len(sites) == 24
    costs = [BitLoRA().cost(site, 32) for site in sites]
    codes = 24 * 32 * (768 + 768)
    assert sum(c.trainable for c in costs) == codes == 1_179_648
    assert sum(c.bits for c in costs) == codes + 24 * 2 * 64
    assert sum(c.tensors for c in costs) == 24
    # 32 times the rank in the space of one LoRA, but for the scales.
    lora = sum(LoRA().cost(site, 1).bits for site in sites)
    assert sum(c.bits for c in costs) == lora + 24 * 2 * 64


@pytest.mark.parametrize("bits", [0, 9, True, 1.5])
def test_bad_bits(bits: object) -> None:
    with pytest.raises(UsageError, match="bit_lora: bits must be a whole number from 1 to 8"):
        BitLoRA(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"), [("scale", 0.0), ("scale", float("nan")), ("dropout", 1.0), ("dropout", -0.1)]
)
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        BitLoRA(**{name: value})
