"""The quantiser behind the methods whose matrices take a few bits per entry."""

from __future__ import annotations

import copy
import struct

import numpy as np
import pytest
import torch
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods._quantiser import Quantiser, bit_cost
from autopeft.methods.codes import lloyd_codes, unpack

EPS = 1e-5


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(0.3 + 0.02 * torch.randn(shape, generator=generator).to(dtype))


def test_hand_worked_matrix() -> None:
    # Mean 2, deviation 2: (-1, -1, 1, 1) around it, and 1 bit stands for -0.6745 or 0.6745 deviations.
    acting = Quantiser(1)("w", torch.tensor([[0.0, 0.0], [4.0, 4.0]]))
    low, high = 2 - 2 * 0.67449, 2 + 2 * 0.67449
    torch.testing.assert_close(acting, torch.tensor([[low, low], [high, high]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_every_entry_gets_the_nearest_value(bits: int) -> None:
    w = matrix(7, 30)
    values = w.detach().double().numpy()
    mean, deviation = values.mean(), values.std()
    standard = (values - mean) / (deviation + EPS)
    codes = lloyd_codes(bits)
    nearest = codes[np.abs(standard[..., None] - codes).argmin(-1)]
    found = Quantiser(bits)("w", w)
    np.testing.assert_allclose(found.detach().numpy(), nearest * deviation + mean, atol=1e-6)
    assert len(found.unique()) <= 2**bits


@pytest.mark.parametrize("bits", [1, 4])
def test_gradient_is_straight_through_with_mean_and_deviation_in_the_graph(bits: int) -> None:
    w = matrix(5, 8, dtype=torch.float64)
    weights = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    quantiser = Quantiser(bits)
    acting = quantiser("w", w)
    (acting * weights).sum().backward()
    # By hand: dq = d((w - m) / (s + eps)), dm = mean(dw), ds = sum((w - m) dw) / (n s).
    flat, n = w.detach(), w.numel()
    m, s = flat.mean(), flat.std(correction=0)
    q = (acting.detach() - m) / s
    by_code = weights * s / (s + EPS)
    by_mean = weights.sum() - by_code.sum()
    by_deviation = (weights * (q - s * (flat - m) / (s + EPS) ** 2)).sum()
    wanted = by_code + by_mean / n + by_deviation * (flat - m) / (n * s)
    torch.testing.assert_close(w.grad, wanted, rtol=1e-5, atol=1e-6)


def test_a_float64_copy_has_the_same_codes() -> None:
    quantiser, w = Quantiser(8), matrix(400, 250)
    exact = copy.deepcopy(quantiser).double()
    gap = (quantiser("w", w).double() - exact("w", w.double())).abs().max()
    assert gap < 1e-7, "a code that differs is a step of about 1e-3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_matrices_act_alike_to_the_last_bit(bits: int, dtype: torch.dtype) -> None:
    one = {"a": matrix(3, 11, dtype=dtype), "b": matrix(13, 3, seed=1, dtype=dtype)}
    writer, reader = Quantiser(bits), Quantiser(bits)
    packed = writer.packed(one)
    two = {"a": nn.Parameter(torch.zeros(3, 11, dtype=dtype)), "b": nn.Parameter(torch.ones(13, 3, dtype=dtype))}
    reader.load(two, packed)
    for name in one:
        assert torch.equal(reader(name, two[name]), writer(name, one[name]))
    again = reader.packed(two)
    assert all(torch.equal(again[name], packed[name]) for name in packed)
    # A copy in float64, as merging makes it.
    exact = copy.deepcopy(reader).double()
    torch.testing.assert_close(exact("a", two["a"].double()), writer("a", one["a"]).double(), rtol=0, atol=1e-7)


def test_packed_bytes_are_scales_and_codes() -> None:
    w = matrix(5, 5)
    packed = Quantiser(3).packed({"w": w, "v": matrix(1, 3)})["packed"]
    assert packed.dtype == torch.uint8
    # 75 bits are 10 bytes and 9 are 2; two floats of 4 bytes lie in front of each.
    assert packed.shape == (8 + 10 + 8 + 2,)
    mean, deviation = struct.unpack("<2f", packed.numpy()[:8].tobytes())
    assert (mean, deviation) == pytest.approx((w.mean().item(), w.std(correction=0).item()))
    first = unpack(packed.numpy()[8:18], 3, 25).reshape(5, 5)
    np.testing.assert_allclose(
        lloyd_codes(3)[first] * deviation + mean, Quantiser(3)("w", w).detach().numpy(), atol=1e-6
    )
    cost = bit_cost(3, (25, 3), entries=99)
    assert (cost.trainable, cost.stored, cost.bits, cost.entries, cost.tensors) == (28, 28, 8 * 28, 99, 1)


def test_training_goes_on_from_what_was_loaded() -> None:
    source, target = {"w": matrix(40, 50)}, {"w": matrix(40, 50, seed=5)}
    quantiser = Quantiser(1)
    quantiser.load(target, Quantiser(1).packed(source))
    w = target["w"]
    loaded = quantiser("w", w)
    loaded.square().sum().backward()
    assert w.grad is not None
    assert w.grad.any()
    # Mean and deviation are those of the original, so that leaving the loaded state changes nothing at 1 bit.
    with torch.no_grad():
        w.view(-1)[0] += 1e-6
    torch.testing.assert_close(quantiser("w", w), loaded, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        w.copy_(matrix(40, 50, seed=6))
    assert torch.equal(quantiser("w", w), Quantiser(1)("w", matrix(40, 50, seed=6)))


@pytest.mark.parametrize("start", [[[0.5]], [[2.0, 2.0, 2.0]]])
def test_equal_entries_act_as_themselves(start: list[list[float]]) -> None:
    w = nn.Parameter(torch.tensor(start))
    acting = Quantiser(2)("w", w)
    assert torch.equal(acting, w)
    acting.sum().backward()
    assert torch.isfinite(w.grad).all()
    other = nn.Parameter(torch.zeros_like(w))
    reader = Quantiser(2)
    reader.load({"w": other}, Quantiser(2).packed({"w": w}))
    assert torch.equal(reader("w", other), w)


def test_what_does_not_fit_is_refused() -> None:
    w = {"w": matrix(4, 4)}
    packed = Quantiser(2).packed(w)
    for wrong in ({}, {"packed": packed["packed"][:-1]}, {**packed, "more": w["w"]}):
        with pytest.raises(UsageError, match="2-bit codes of w are packed"):
            Quantiser(2).load(w, wrong)
    with pytest.raises(UsageError, match="1-bit codes"):
        Quantiser(1).load(w, packed)
    with pytest.raises(UsageError, match="float32"):
        Quantiser(2).load(w, {"packed": packed["packed"].float()})
