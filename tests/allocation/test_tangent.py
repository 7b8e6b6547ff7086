from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.allocation.tangent import tangent_gains
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.methods.adaptformer import AdaptFormer
from autopeft.methods.bias import Bias
from autopeft.methods.bottleneck import BottleneckAdapter
from autopeft.methods.core import Core
from autopeft.methods.fact import FacT
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.snell import SNELL
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF

LINEAR = Site("fc", "fc", "linear", (6, 5), True, 0, "mlp.fc1", ("weight", "bias", "output"))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(*shape: int, seed: int = 0) -> TensorEvidence:
    signal = normal(*shape, seed=seed)
    return TensorEvidence(normal(*shape, seed=seed + 50).float(), signal, signal.square())


def evidence_of(site: Site, seed: int = 0) -> Evidence:
    slots = {"weight": known(*site.shape, seed=seed)}
    if site.has_bias:
        slots["bias"] = known(site.shape[0], seed=seed + 1)
    return Evidence(site, slots)


EVIDENCE = evidence_of(LINEAR)


def test_linear_parametrisations_have_their_own_formula() -> None:
    """Where the change is linear in the parameters and orthonormal, the projection is what `gains` says."""
    norm = Site("n", "n", "layer_norm", (6,), True, 0, "norm", ("weight", "bias"))
    for method, site, sizes in (
        (Core(), LINEAR, (1, 3, 5)),
        (Bias(), LINEAR, (1,)),
        (Sparse(), LINEAR, (1, 7, 30)),
        (Sparse("bias"), LINEAR, (2,)),
        (Norm(), norm, (1,)),
    ):
        evidence = evidence_of(site)
        found = tangent_gains(method, site, evidence, sizes)
        assert found == pytest.approx(method.gains(site, evidence, sizes), rel=1e-5), type(method).__name__


def test_a_low_rank_tangent_is_the_two_factors_projection() -> None:
    """At factors B and A the tangent is `{X A + B Y}`: P s = s - (1 - P_B) s (1 - P_A). Rank 5 of 5 captures all."""
    site, signal = LINEAR, EVIDENCE["weight"].signal
    for size in (1, 2):
        (found,) = tangent_gains(LoRA(), site, EVIDENCE, (size,), seed=3) or ()
        generator = torch.Generator().manual_seed(3)
        a = torch.empty(size, 5)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.randn(6, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        qa, qb = torch.linalg.qr(a.double().T).Q, torch.linalg.qr(b).Q
        rest = (signal - qb @ (qb.T @ signal)) @ (torch.eye(5, dtype=torch.float64) - qa @ qa.T)
        assert found == pytest.approx(float(signal.square().sum() - rest.square().sum()), rel=1e-4)
        assert found <= float(signal.square().sum())


def test_scale_and_shift_against_the_explicit_jacobian() -> None:
    """SSF: `W -> gamma W`, `b -> gamma b + beta`; the projection by least squares on the columns of J."""
    weight, bias = EVIDENCE["weight"], EVIDENCE["bias"]
    columns = []
    for row in range(6):
        change_w, change_b = torch.zeros(6, 5, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        change_w[row], change_b[row] = weight.value[row].double(), bias.value[row].double()
        columns.append(torch.cat((change_w.flatten(), change_b)))
        shift = torch.zeros(6, dtype=torch.float64)
        shift[row] = 1
        columns.append(torch.cat((torch.zeros(30, dtype=torch.float64), shift)))
    jacobian = torch.stack(columns, 1)
    signal = torch.cat((weight.signal.flatten(), bias.signal))
    q = torch.linalg.qr(jacobian).Q
    found = tangent_gains(SSF(), LINEAR, EVIDENCE, (1,))
    assert found == pytest.approx((float((q.T @ signal).square().sum()),), rel=1e-4)


def test_a_bottleneck_is_seen_through_its_output() -> None:
    """`U act(D y) + u` near zero is the matrix `slope (U D)`: the low-rank projection, and all of the shift."""
    site = LINEAR
    (found,) = tangent_gains(BottleneckAdapter(), site, EVIDENCE, (1,), seed=1) or ()
    weight, bias = EVIDENCE["weight"], EVIDENCE["bias"]
    matrix = weight.signal @ weight.value.double().T + torch.outer(bias.signal, bias.value.double())
    shift = float(bias.signal.square().sum())
    assert shift < found < shift + float(matrix.square().sum())


def test_methods_without_a_formula_of_their_own_and_of_groups() -> None:
    """SNELL's kernel, a slice of a fused projection, and FacT's one tensor for two weights."""
    wide = dataclasses.replace(LINEAR, shape=(24, 20))
    (found,) = tangent_gains(SNELL(), wide, evidence_of(wide), (2,)) or ()
    assert 0 < found < float(evidence_of(wide)["weight"].signal.square().sum())
    part = dataclasses.replace(LINEAR, name="qkv[k]", rows=(6, 12), parent="qkv")
    own = evidence_of(part)
    assert tangent_gains(Core(), part, own, (2,)) == pytest.approx(Core().gains(part, own, (2,)), rel=1e-5)
    members = tuple(
        Site(f"blocks.{i}.fc", f"blocks.{i}.fc", "linear", (8, 8), True, i, "mlp.fc1", ("weight",)) for i in range(2)
    )
    group = Site("*", "", "group", (2,), False, 0, "group", (), members=members)
    together = Evidence(group, {}, {m.name: evidence_of(m, i) for i, m in enumerate(members)})
    (found,) = tangent_gains(FacT(), group, together, (2,)) or ()
    total = sum(float(e["weight"].signal.square().sum()) for e in together.members.values())
    assert 0 < found < total


def test_what_it_cannot_build_is_left_to_the_method() -> None:
    block = Site("blocks.0", "blocks.0", "residual", (6,), False, 0, "mlp", ("output",), entry="n")
    output = Evidence(block, {"output": known(6, 6)})
    assert tangent_gains(AdaptFormer(), block, output, (1,)) is None


def test_signals_of_nothing() -> None:
    zero = TensorEvidence(EVIDENCE["weight"].value, torch.zeros(6, 5), torch.zeros(6, 5))
    assert tangent_gains(Core(), LINEAR, Evidence(LINEAR, {"weight": zero}), (2,)) == (0.0,)


def test_the_start_is_the_seed_s() -> None:
    def gain(seed: int) -> Any:
        return tangent_gains(LoRA(), LINEAR, EVIDENCE, (1,), seed)

    assert gain(1) == gain(1)
    assert gain(1) != gain(2)
