from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods._ring import ring_matrix
from autopeft.methods._transform import project_on_transforms
from autopeft.methods.tlora import TLoRA
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLawsOfTheRing(MethodLaws):
    def make(self) -> Method:
        return TLoRA(residual="ring", transform_rank=1, alpha=2.0, strength=0.1)


class TestLawsOfTheRingMatrix(MethodLaws):
    def make(self) -> Method:
        return TLoRA(residual="ring_matrix", transform_rank=1, modes=2)


def test_hand_worked(site_of, build) -> None:
    host = nn.Linear(4, 20)
    adapter = build(TLoRA(transform_rank=1, modes=2, alpha=3.0), site_of(host), host, 1)
    first, second = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        host.weight.zero_()
        host.weight[0] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
        adapter.cores[0].copy_(first[:, :, None, None])
        adapter.cores[1].copy_(second[:, :, None, None])
        adapter.A.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
        adapter.B[1] = 1.0
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
    # Columns (i, j): the second factor triples j = 0; the first adds twice row i = 0 to i = 1.
    assert merged[0].tolist() == [3.0, 10.0, 306.0, 1020.0]
    assert merged[1].tolist() == [0.0, 0.0, 0.0, 3.0]
    assert not merged[2:].any()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_transform_starts_at_the_identity(site_of, build, rank: int, spread: float) -> None:
    host = nn.Linear(64, 64).double()
    adapter = build(TLoRA(transform_rank=rank, spread=spread), site_of(host), host, 1)
    assert adapter.transform_change().abs().max() < 1e-14
    assert not adapter.residual_change().any()
    if spread == 0.0:
        for core in adapter.cores:
            eye = torch.eye(len(core), dtype=torch.float64)[:, :, None, None] / rank
            torch.testing.assert_close(core.detach(), eye.expand_as(core))


def test_the_papers_start_never_uses_more_than_rank_1(site_of, build) -> None:
    host = nn.Linear(27, 30).double()
    target = torch.randn(30, 27, dtype=torch.float64)
    apart = {}
    for spread in (0.0, 0.1):
        adapter = build(TLoRA(spread=spread), site_of(host), host, 1)
        optimizer = torch.optim.Adam(list(adapter.cores), lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
            (merged - target).square().sum().backward()
            optimizer.step()
        # A transform of rank 1 is a Kronecker product: re-ordered by its first mode, a matrix of rank 1.
        change = adapter.transform_change().detach() + torch.eye(27, dtype=torch.float64)
        pairs = change.view(3, 9, 3, 9).permute(0, 2, 1, 3).reshape(9, 81)
        values = torch.linalg.svdvals(pairs)
        apart[spread] = float(values[1] / values[0])
    assert apart[0.0] < 1e-10
    assert apart[0.1] > 1e-4


def test_start_of_the_residuals(site_of, build) -> None:
    host = nn.Linear(512, 512)
    ring = build(TLoRA(residual="ring"), site_of(host), host, 20)
    assert not ring.rows[0].any()
    assert float(ring.rows[1].detach().std()) == pytest.approx(math.sqrt(8) / 400, rel=0.05)
    assert float(ring.columns[0].detach().std()) == pytest.approx(1 / math.sqrt(8), rel=0.05)
    cells = build(TLoRA(residual="ring_matrix"), site_of(host), host, 20).cells
    assert not cells[0].any()
    assert float(cells[1].detach().std()) == pytest.approx(1 / (20 * math.sqrt(8)), rel=0.05)


@pytest.mark.parametrize("residual", ["lora", "ring", "ring_matrix"])
def test_weight_is_the_transformed_one_and_the_scaled_residual(site_of, build, residual: str) -> None:
    host = nn.Conv2d(12, 24, 3, groups=2).double()
    adapter = build(TLoRA(residual=residual, alpha=6.0, transform_rank=1), site_of(host), host, 2)
    for p in adapter.parameters():
        nn.init.normal_(p)
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})
    transform = ring_matrix(list(adapter.cores))
    residual_only = adapter.residual_change() * math.sqrt(2) / 6.0
    oracle = host.weight.flatten(1) @ transform + 6.0 / math.sqrt(2) * residual_only
    torch.testing.assert_close(merged["weight"].flatten(1), oracle)
    assert merged["bias"] is host.bias
    if residual == "lora":
        torch.testing.assert_close(residual_only, adapter.B @ adapter.A)


def test_penalty_is_the_distance_from_the_start(site_of, build) -> None:
    host = nn.Linear(27, 30).double()
    adapter = build(TLoRA(strength=0.5), site_of(host), host, 1)
    assert float(adapter.penalty().detach()) == 0.0
    with torch.no_grad():
        adapter.cores[1] += 2.0  # 3 * 3 * 2 * 2 entries
    penalty = adapter.penalty()
    assert float(penalty.detach()) == pytest.approx(0.5 * 36 * 4)
    penalty.backward()
    assert float(adapter.cores[1].grad.mean()) == pytest.approx(0.5 * 2 * 2)
    assert build(TLoRA(), site_of(host), host, 1).penalty() is None


def test_gains_of_the_first_step(site_of, evidence_of) -> None:
    site = site_of(nn.Linear(27, 30))
    weight = torch.randn(30, 27, dtype=torch.float64)
    known = evidence_of(site, {"weight": weight}, {"weight": 2.0 * weight})  # scaling is a transform
    whole = float((2 * weight).square().sum())
    for residual in ("lora", "ring", "ring_matrix"):
        assert TLoRA(residual=residual).gains(site, known, (1, 2)) == pytest.approx((whole, whole))
    signal = torch.randn(30, 27, dtype=torch.float64)
    known = evidence_of(site, {"weight": weight}, {"weight": signal})
    whole = float(signal.square().sum())
    lora = TLoRA().gains(site, known, (1, 2, 27))
    assert lora[0] < lora[1] < lora[2] == pytest.approx(whole)
    held, rest = project_on_transforms(weight, signal, (3, 3, 3))
    assert lora[0] == pytest.approx(held + float(torch.linalg.matrix_norm(rest, 2)) ** 2)
    # p / n of what the transform leaves: rings over (2, 3, 5) and (3, 3, 3) have 19 and 4 * 19 entries, of 810.
    ring = TLoRA(residual="ring").gains(site, known, (1, 2))
    assert ring == pytest.approx([held + p / 810 * (whole - held) for p in (19, 76)])


@pytest.mark.parametrize(
    "fields",
    [
        {"residual": "ttv"},
        {"transform_rank": 0},
        {"modes": 0},
        {"alpha": -1.0},
        {"strength": -0.1},
        {"spread": 0.6},
    ],
)
def test_bad_fields(fields: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        TLoRA(**fields)


def test_sizes_end_where_it_is_no_smaller(site_of) -> None:
    site = site_of(nn.Linear(64, 64))
    for residual in ("lora", "ring", "ring_matrix"):
        method = TLoRA(residual=residual)
        assert method.cost(site, method.sizes(site)[-1]).trainable < 64 * 64
    assert TLoRA(residual="ring").sizes(site)[-1] == 8  # a matrix of rank 64
    assert TLoRA().slots(site_of(nn.Linear(13, 13))) == ()  # a prime has one factor


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    proj = catalog["blocks.0.attn.proj"]
    assert TLoRA(transform_rank=1).cost(proj, 4).trainable == 272 + 4 * 1536
    assert TLoRA().cost(proj, 4).trainable == 4 * 272 + 4 * 1536
    assert TLoRA(residual="ring").cost(proj, 4).trainable == 4 * 272 + 16 * (28 + 28)
    assert TLoRA(residual="ring_matrix").cost(proj, 4).trainable == 4 * 272 + 16 * 272
    sites = [s for s in catalog.candidates("whole") if s.kind == "linear"]
    transforms = 12 * 4 * (3 * 272 + 656)  # 3072 = 12 * 16 * 16
    assert sum(TLoRA().cost(s, 1).trainable for s in sites) == transforms + 147_456
