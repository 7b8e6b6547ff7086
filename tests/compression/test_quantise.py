import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopeft.compression.loader import unpack
from autopeft.compression.quantise import pack, quantise
from autopeft.errors import UsageError
from autopeft.methods.codes import lloyd_codes


@given(st.integers(1, 8), st.data())
def test_packing_and_back_is_exact(bits, data):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70)), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.nbytes == -(-len(codes) * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, len(codes)), codes)


def test_packing_by_hand():
    assert pack(np.array([5, 2, 7], dtype=np.uint8), 3).tolist() == [0b10101011, 0b10000000]
    assert pack(np.array([1, 0, 1, 1], dtype=np.uint8), 1).tolist() == [0b10110000]


def test_one_bit_by_hand():
    # Mean 1, deviation 2: -1 is one deviation below, 3 one above.
    found = quantise(torch.tensor([[-1.0, 3.0], [3.0, -1.0]]), 1)
    assert (found.offset, found.scale) == (1.0, 2.0)
    low, high = 1 - 2 * 0.67448975, 1 + 2 * 0.67448975
    torch.testing.assert_close(found.values(), torch.tensor([[low, high], [high, low]]))
    assert found.packed.tolist() == [0b01100000]


def test_uniform_two_bits_by_hand():
    found = quantise(torch.tensor([0.0, 0.9, 1.1, 2.2, 3.0]), 2, "uniform")
    assert found.values().tolist() == [0.0, 1.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("codes", ["lloyd", "uniform"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_no_code_is_nearer_than_the_one_that_is_taken(codes, bits):
    # A tiny change: the deviation is below what the paper adds to it.
    x = 1e-6 * torch.randn(13, 11, generator=torch.Generator().manual_seed(0)) + 3e-7
    found = quantise(x, bits, codes)
    table = found.table().double() * found.scale + found.offset
    nearest = (x.double().unsqueeze(-1) - table).abs().min(dim=-1).values
    torch.testing.assert_close((found.values().double() - x.double()).abs(), nearest, atol=1e-12, rtol=1e-5)


def test_the_mean_error_of_normal_entries_is_that_of_the_codes():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    grid = np.linspace(-9, 9, 90_001)
    weight = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi) * (grid[1] - grid[0])
    for bits in (1, 2, 4):
        expected = weight @ np.abs(grid[:, None] - lloyd_codes(bits)).min(axis=1)
        measured = float((quantise(x, bits).values() - x).abs().mean())
        assert measured == pytest.approx(expected, rel=0.01)


def test_lloyd_is_nearer_than_uniform_on_bell_shaped_values():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    errors = {codes: float((quantise(x, 3, codes).values() - x).abs().mean()) for codes in ("lloyd", "uniform")}
    assert errors["lloyd"] < 0.8 * errors["uniform"]


@pytest.mark.parametrize("codes", ["lloyd", "uniform"])
def test_equal_entries_are_exact(codes):
    x = torch.full((3, 2), 0.1)
    torch.testing.assert_close(quantise(x, 2, codes).values(), x, atol=0, rtol=0)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(UsageError, match="not finite"):
        quantise(torch.tensor([1.0, float("nan")]), 4)
    with pytest.raises(UsageError, match="empty"):
        quantise(torch.zeros(0), 4)
    with pytest.raises(UsageError, match="1 to 8"):
        quantise(torch.ones(3), 9)
    with pytest.raises(UsageError, match="lloyd, uniform"):
        quantise(torch.ones(3), 4, "kmeans")
