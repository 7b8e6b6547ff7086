"""What steps do to memorisation, against projections worked out directly in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from autopeft.allocation.memory import memory_changes
from autopeft.allocation.tangent import tangent_gains
from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.methods.bias import Bias
from autopeft.methods.bottleneck import BottleneckAdapter
from autopeft.methods.core import Core
from autopeft.methods.fact import FacT
from autopeft.methods.full import Full
from autopeft.methods.lora import LoRA
from autopeft.methods.ramt import RAMT
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF
from autopeft.methods.svdiff import SVDiff

SITE = Site("fc", "fc", "linear", (6, 5), True, 0, "mlp.fc1", ("weight", "bias", "output"))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(*shape: int, seed: int) -> TensorEvidence:
    score = normal(*shape, seed=seed + 3).square()
    return TensorEvidence(
        normal(*shape, seed=seed).float(), normal(*shape, seed=seed + 1), score, memory=normal(*shape, seed=seed + 2)
    )


EVIDENCE = Evidence(SITE, {"weight": known(6, 5, seed=0), "bias": known(6, seed=10)})
WEIGHT, BIAS = EVIDENCE["weight"], EVIDENCE["bias"]
S, T = WEIGHT.signal, WEIGHT.memory
assert T is not None
assert BIAS.memory is not None


def changes(method: Method, sizes: Sequence[int], evidence: Evidence = EVIDENCE, source: str = "noise_difference"):  # type: ignore[no-untyped-def]  # a tuple, never None here
    found = memory_changes(lambda seen: method.gains(SITE, seen, sizes), evidence, source)
    assert found is not None
    return found


def leading(signal: Tensor, rank: int) -> Callable[[Tensor], float]:
    """The energy that a rank-r step captures of any tensor, in the singular directions of one signal."""
    u, _, vh = torch.linalg.svd(signal)
    return lambda x: float(torch.stack([(u[:, i] @ x @ vh[i]) ** 2 for i in range(rank)]).sum())


def test_a_vector_by_hand() -> None:
    """s = (1, 2), t = (3, -1): a step of -s changes M by -(3 - 2) = -1."""
    site = Site("n", "n", "layer_norm", (2,), True, 0, "norm", ("weight", "bias"))
    slots = {
        "bias": TensorEvidence(
            torch.zeros(2), torch.tensor([1.0, 2.0]), torch.ones(2), memory=torch.tensor([3.0, -1.0])
        )
    }
    found = memory_changes(lambda e: Bias().gains(site, e, (1,)), Evidence(site, slots), "noise_difference")
    assert found == pytest.approx((-1.0,), rel=1e-6)


def test_entries_are_those_of_the_score() -> None:
    order = WEIGHT.score.flatten().argsort(descending=True)
    for size, change in zip((1, 4, 9), changes(Sparse(), (1, 4, 9)), strict=True):
        own = order[:size]
        assert change == pytest.approx(-float(S.flatten()[own] @ T.flatten()[own]), rel=1e-6)  # type: ignore[union-attr]  # checked above


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_low_rank_is_in_the_signal_s_own_directions(scale: float) -> None:
    """Two oracles: `-sum sigma_i u_i^T T v_i`, and polarisation with the singular vectors of s in both energies."""
    t = scale * T
    evidence = dataclasses.replace(EVIDENCE, slots={"weight": dataclasses.replace(WEIGHT, memory=t)})
    u, sigma, vh = torch.linalg.svd(S)
    for rank, change in zip((1, 2, 4), changes(LoRA(), (1, 2, 4), evidence), strict=True):
        direct = -sum(float(sigma[i] * (u[:, i] @ t @ vh[i])) for i in range(rank))
        energy = leading(S, rank)
        assert change == pytest.approx(direct, rel=1e-5)
        assert -(energy(S + t) - energy(S - t)) / 4 == pytest.approx(direct, rel=1e-9)


def test_a_subspace_of_the_sum_would_be_noticed() -> None:
    """Polarisation of the methods' own energies lets s + t and s - t choose: far from what a step of s does."""
    u, sigma, vh = torch.linalg.svd(S)
    for rank in (1, 2):
        direct = -sum(float(sigma[i] * (u[:, i] @ T @ vh[i])) for i in range(rank))
        sides = []
        for sign in (1, -1):
            moved = dataclasses.replace(WEIGHT, signal=S + sign * T)  # type: ignore[operator]  # checked above
            sides.append(LoRA().gains(SITE, Evidence(SITE, {"weight": moved}), (rank,))[0])
        assert abs(-(sides[0] - sides[1]) / 4 - direct) > 0.1 * abs(direct)


FIXED: dict[str, tuple[Method, tuple[int, ...], float]] = {
    "full": (Full(), (1,), 1e-6),
    "core": (Core(), (1, 3, 5), 1e-6),
    "svdiff": (SVDiff(), (1,), 1e-6),
    "ssf": (SSF(), (1,), 1e-6),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_subspaces_are_polarised_exactly(name: str) -> None:
    """Where the subspace is the same for every signal, a distance of 1 is exact too."""
    method, sizes, tolerance = FIXED[name]
    sides = []
    for sign in (1, -1):
        slots = {
            slot: dataclasses.replace(k, signal=k.signal + sign * k.memory)  # type: ignore[operator]  # all have one
            for slot, k in EVIDENCE.slots.items()
        }
        sides.append(method.gains(SITE, dataclasses.replace(EVIDENCE, slots=slots), sizes))
    wanted = [-(a - b) / 4 for a, b in zip(*sides, strict=True)]
    assert changes(method, sizes) == pytest.approx(tuple(wanted), rel=tolerance, abs=1e-7)


def test_bases_of_the_signal_follow_it() -> None:
    """A core between the signal's own singular vectors: its leading block of `U^T T V`."""
    u, sigma, vh = torch.linalg.svd(S)
    for size, change in zip((1, 3), changes(Core(basis="gradient"), (1, 3)), strict=True):
        wanted = -sum(float(sigma[i] * (u[:, i] @ T @ vh[i])) for i in range(size))
        assert change == pytest.approx(wanted, rel=1e-5)


def test_a_choice_by_sign_stays_the_signal_s() -> None:
    own = (S * WEIGHT.value) > 0
    assert changes(RAMT(), (1,)) == pytest.approx((-float((S * T)[own].sum()),), rel=1e-6)  # type: ignore[operator]  # checked above


def test_a_jump_on_one_side_does_not_count() -> None:
    """A choice that flips just above s: the energy jumps by 1000 there, and the slope below s is the true one."""

    def gains(evidence: Evidence) -> tuple[float, ...]:
        signal = evidence["weight"].signal
        energy = float(signal.square().sum())
        return (energy + (1000.0 if float((signal - S).flatten() @ T.flatten()) > 0 else 0.0),)  # type: ignore[union-attr]  # checked above

    assert memory_changes(gains, EVIDENCE, "noise_difference") == pytest.approx((-float((S * T).sum()),), rel=1e-3)  # type: ignore[operator]  # checked above


def test_tangents_are_polarised_at_full_length() -> None:
    """SSF's projection by least squares on its explicit Jacobian: `-(Q^T s) (Q^T t)`."""
    columns = []
    for row in range(6):
        weight, bias, shift = torch.zeros(6, 5), torch.zeros(6), torch.zeros(6)
        weight[row], bias[row], shift[row] = WEIGHT.value[row], BIAS.value[row], 1
        columns += [torch.cat((weight.flatten(), bias)), torch.cat((torch.zeros(30), shift))]
    q = torch.linalg.qr(torch.stack(columns, 1).double()).Q
    s, t = torch.cat((S.flatten(), BIAS.signal)), torch.cat((T.flatten(), BIAS.memory))  # type: ignore[union-attr,list-item]  # checked above

    def gains(evidence: Evidence) -> tuple[float, ...]:
        found = tangent_gains(SSF(), SITE, evidence, (1,))
        assert found is not None
        return found

    found = memory_changes(gains, EVIDENCE, "noise_difference", fixed=True)
    assert found == pytest.approx((-float((q.T @ s) @ (q.T @ t)),), rel=1e-4)


def test_adapters_move_what_they_are_read_off() -> None:
    """A bottleneck sees `G W^T + g_b b^T` of signal and memory, in its leading directions, and all of the shift."""
    (change,) = changes(BottleneckAdapter(), (1,))
    w, b = WEIGHT.value.double(), BIAS.value.double()
    assert T is not None
    assert BIAS.memory is not None
    signal, memory = (g @ w.T + torch.outer(shift, b) for g, shift in ((S, BIAS.signal), (T, BIAS.memory)))
    u, sigma, vh = torch.linalg.svd(signal)
    slope = (BottleneckAdapter().gains(SITE, EVIDENCE, (1,))[0] - float(BIAS.signal.square().sum())) / sigma[0] ** 2
    wanted = -float(slope * sigma[0] * (u[:, 0] @ memory @ vh[0]) + BIAS.signal @ BIAS.memory)
    assert 0 < slope <= 1
    assert change == pytest.approx(wanted, rel=1e-5)


def test_groups_move_with_their_members() -> None:
    sites = [Site(f"m{i}", f"m{i}", "linear", (4, 4), False, i, "mlp.fc1", ("weight",)) for i in range(3)]
    group = Site("*", "", "group", (4, 4), False, 0, "group", ("weight",), members=tuple(sites))
    members = {s.name: Evidence(s, {"weight": known(4, 4, seed=20 + 5 * i)}) for i, s in enumerate(sites)}
    method = FacT(form="tt")
    whole = method.sizes(group)[-1]
    found = memory_changes(lambda e: method.gains(group, e, (whole,)), Evidence(group, {}, members), "noise_difference")
    # The largest rank spans everything, whatever directions come first.
    wanted = -sum(float((e["weight"].signal * e["weight"].memory).sum()) for e in members.values())  # type: ignore[operator]  # all have one
    assert whole == 4
    assert found == pytest.approx((wanted,), rel=1e-4)


def test_the_gap_is_what_one_half_learns_and_the_other_does_not() -> None:
    """s = (3, 1), t = (2, 0): halves (4, 1) and (2, 1). On A: 4 * 2 = 8; on C: 2 * -2 = -4; mean 2 = |t|^2 / 2."""
    site = Site("n", "n", "layer_norm", (2,), True, 0, "norm", ("weight", "bias"))
    slots = {
        "bias": TensorEvidence(torch.zeros(2), torch.tensor([3.0, 1.0]), torch.ones(2), memory=torch.tensor([2.0, 0]))
    }
    found = memory_changes(lambda e: Bias().gains(site, e, (1,)), Evidence(site, slots), "gap")
    assert found == pytest.approx((2.0,), rel=1e-6)


def test_each_half_chooses_for_the_gap() -> None:
    a, c = S + T / 2, S - T / 2  # type: ignore[operator]  # checked above
    for rank, change in zip((1, 3), changes(LoRA(), (1, 3), source="gap"), strict=True):
        total = 0.0
        for own, other in ((a, c), (c, a)):
            u, sigma, vh = torch.linalg.svd(own)
            total += sum(float(sigma[i] * (u[:, i] @ (own - other) @ vh[i])) for i in range(rank)) / 2
        assert change == pytest.approx(total, rel=1e-5)
    for size, change in zip((2, 7), changes(Sparse(), (2, 7), source="gap"), strict=True):
        total = 0.0
        for own, other in ((a, c), (c, a)):
            best = own.square().flatten().argsort(descending=True)[:size]
            total += float(own.flatten()[best] @ (own - other).flatten()[best]) / 2
        assert change == pytest.approx(total, rel=1e-5)
    everything = changes(Full(), (1,), source="gap")
    assert everything == pytest.approx((float(T.square().sum() + BIAS.memory.square().sum()) / 2,), rel=1e-6)  # type: ignore[union-attr]  # checked above


def test_nothing_measured_and_nothing_moved() -> None:
    bare = {slot: dataclasses.replace(k, memory=None) for slot, k in EVIDENCE.slots.items()}
    assert memory_changes(lambda e: (1.0,), dataclasses.replace(EVIDENCE, slots=bare), "noise_difference") is None
    still = {slot: dataclasses.replace(k, memory=torch.zeros_like(k.signal)) for slot, k in EVIDENCE.slots.items()}
    for source in ("noise_difference", "gap"):
        assert changes(LoRA(), (1, 2), dataclasses.replace(EVIDENCE, slots=still), source) == (0.0, 0.0)
