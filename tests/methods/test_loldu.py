from __future__ import annotations

import pytest
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods._ldu import ldu
from autopeft.methods.loldu import LoLDU
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return LoLDU(start="uniform", alpha=2.0, train_scale=True)


@pytest.mark.parametrize("shape", [(7, 7), (12, 5), (5, 12), (6, 2, 3, 3)])
def test_factors_are_those_of_partial_pivoting(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    matrix = weight.flatten(1)
    m = min(matrix.shape)
    left, diagonal, right = ldu(weight, None, m)
    p, lower, upper = scipy.linalg.lu(matrix.numpy())
    raw = torch.from_numpy(upper)
    torch.testing.assert_close(left, torch.from_numpy(p @ lower).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(diagonal, raw.diagonal().float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(right, (raw / raw.diagonal()[:, None]).float(), atol=1e-4, rtol=1e-4)
    assert left.abs().max() <= 1


def test_hand_worked_factors() -> None:
    left, diagonal, right = ldu(torch.tensor([[2.0, 4.0], [4.0, 2.0]]), None, 2)
    # The pivot is row 1: 4, then 4 - 2/4 * 2 = 3.
    assert left.tolist() == [[0.5, 1.0], [1.0, 0.0]]
    assert diagonal.tolist() == [4.0, 3.0]
    assert right.tolist() == [[1.0, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("weight", "diagonal"),
    [
        (torch.tensor([[0.0, 3.0], [0.0, 6.0]]), [1.0, 6.0]),  # a zero column: the row stays as it is
        (torch.tensor([[2.0, 3.0], [4.0, 6.0]]), [4.0, 0.0]),  # rank 1: nothing is left for the second
        (torch.zeros(3, 2), [0.0, 0.0]),
    ],
)
def test_zero_pivots(weight: Tensor, diagonal: list[float]) -> None:
    left, found, right = ldu(weight, None, 2)
    assert found.tolist() == diagonal
    torch.testing.assert_close(left @ torch.diag(found) @ right, weight, atol=0, rtol=0)
    assert all(t.isfinite().all() for t in (left, right))
    assert right.any(dim=1).all()
    assert left.any(dim=0).all()


def test_near_ties_do_not_move_the_pivot() -> None:
    weight = torch.tensor([[1.0, 2.0], [1.0, 5.0]], dtype=torch.float64)
    nudged = weight + torch.tensor([[0.0, 0.0], [1e-14, 0.0]], dtype=torch.float64)
    assert ldu(nudged, None, 2)[0].tolist() == ldu(weight, None, 2)[0].tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_leading_atoms_do_not_depend_on_how_many_are_asked_for() -> None:
    weight = torch.randn(80, 90)
    few, all_ = ldu(weight, (0, 75), 3), ldu(weight, (0, 75), 75)
    assert torch.equal(few[0], all_[0][:, :3])
    assert torch.equal(few[1], all_[1][:3])
    assert torch.equal(few[2], all_[2][:3])


@pytest.mark.parametrize("start", ["lu", "ones", "zeros", "constant", "normal", "uniform"])
@pytest.mark.parametrize("train_scale", [False, True])
def test_every_start_is_the_identity(site_of, build, start: str, train_scale: bool) -> None:
    host = nn.Linear(8, 6)
    method = LoLDU(start=start, alpha=0.3, train_scale=train_scale)
    adapter = build(method, site_of(host), host, 3)
    assert not adapter.delta()["weight"].any()
    diagonal = ldu(host.weight, None, 3)[1]
    fixed = {"lu": diagonal, "ones": torch.ones(3), "zeros": torch.zeros(3), "constant": torch.full((3,), 0.01)}
    if start in fixed:
        assert torch.equal(adapter.z, fixed[start])
    assert method.cost(site_of(host), 3).trainable == sum(p.numel() for p in adapter.parameters()) == 3 + train_scale


def test_change_is_linear_in_the_diagonal(site_of, build) -> None:
    host = nn.Linear(8, 6).double()
    adapter = build(LoLDU(alpha=6.0), site_of(host), host, 3)
    left, _, right = (t.double() for t in ldu(host.weight, None, 3))
    with torch.no_grad():
        adapter.z.add_(torch.tensor([1.0, 2.0, 3.0]))
    oracle = 2.0 * sum(i * torch.outer(left[:, i - 1], right[i - 1]) for i in (1, 2, 3))
    torch.testing.assert_close(adapter.delta()["weight"], oracle)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(adapter.branch(x), x @ oracle.T)
    down, up = adapter.low_rank()
    torch.testing.assert_close(up @ down, oracle)


def test_with_the_weights_own_start_zero_takes_the_atoms_away(site_of, build) -> None:
    host = nn.Linear(8, 6).double()
    adapter = build(LoLDU(), site_of(host), host, 6)
    nn.init.zeros_(adapter.z)
    torch.testing.assert_close(adapter.delta()["weight"], -host.weight, atol=1e-5, rtol=1e-5)


def test_random_starts_belong_to_seed_and_site(site_of, build) -> None:
    host = nn.Linear(8, 6)
    site = site_of(host)
    first = build(LoLDU(start="normal", seed=1), site, host, 4).z
    assert torch.equal(first, build(LoLDU(start="normal", seed=1), site, host, 4).z)
    assert not torch.equal(first, build(LoLDU(start="normal", seed=2), site, host, 4).z)


def test_gains_are_projections(site_of, evidence_of) -> None:
    host = nn.Linear(7, 5).double()
    site = site_of(host)
    signal = torch.randn(5, 7, dtype=torch.float64)
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": signal})
    left, _, right = (t.double() for t in ldu(host.weight, None, 5))
    for size, gain in zip((1, 2, 3, 4, 5), LoLDU().gains(site, known, (1, 2, 3, 4, 5)), strict=True):
        atoms = torch.stack([torch.outer(left[:, i], right[i]).flatten() for i in range(size)], 1)
        basis, _ = torch.linalg.qr(atoms)
        assert gain == pytest.approx(float((basis.T @ signal.flatten()).square().sum()), rel=1e-5)


def test_grouped_convolution_is_the_dense_change(site_of, build) -> None:
    host = nn.Conv2d(8, 16, 3, groups=4, padding=1).double()
    adapter = build(LoLDU(start="ones"), site_of(host), host, 2)
    nn.init.normal_(adapter.z)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(adapter.branch(x), F.conv2d(x, adapter.delta()["weight"], None, 1, 1, 1, 4))


def test_bad_fields() -> None:
    with pytest.raises(UsageError, match="start must be one of lu"):
        LoLDU(start="lo")
    with pytest.raises(UsageError, match="alpha"):
        LoLDU(alpha=0.0)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates("whole") if s.kind == "linear"]
    assert sum(LoLDU().cost(s, 64).trainable for s in sites) == 48 * 64
    assert sum(LoLDU(train_scale=True).cost(s, 64).stored for s in sites) == 48 * 65
    assert sum(LoLDU().cost(s, LoLDU().sizes(s)[-1]).trainable for s in sites) == 36_864
