import numpy as np
import pytest
from scipy.stats import norm

from autopeft.compression import loader
from autopeft.errors import UsageError
from autopeft.methods.codes import kept_energy, lloyd_codes, pack, unpack


def test_one_and_two_bits_are_the_published_values():
    np.testing.assert_allclose(lloyd_codes(1), [-0.6745, 0.6745], atol=5e-5)
    np.testing.assert_allclose(lloyd_codes(2), [-1.2657, -0.3778, 0.3778, 1.2657], atol=5e-5)
    # The median of the positive half of the normal distribution is its third quartile.
    assert lloyd_codes(1)[1] == pytest.approx(norm.ppf(0.75), abs=1e-14)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_value_is_the_median_of_its_cell(bits):
    codes = lloyd_codes(bits)
    assert codes.shape == (2**bits,)
    assert np.all(np.diff(codes) > 0)
    np.testing.assert_array_equal(codes, -codes[::-1])
    edges = np.concatenate([[-np.inf], (codes[1:] + codes[:-1]) / 2, [np.inf]])
    below, above = norm.cdf(edges[:-1]), norm.cdf(edges[1:])
    np.testing.assert_allclose(norm.cdf(codes) - below, above - norm.cdf(codes), atol=1e-14)


def test_lloyds_own_iteration_ends_in_the_same_values():
    codes = np.linspace(-2, 2, 8)
    for _ in range(2000):
        below = norm.cdf((codes[1:] + codes[:-1]) / 2)
        codes = norm.ppf((np.concatenate([[0], below]) + np.concatenate([below, [1]])) / 2)
    np.testing.assert_allclose(codes, lloyd_codes(3), atol=1e-10)


def test_no_nearby_values_have_a_smaller_mean_absolute_error():
    grid = np.linspace(-8, 8, 160_001)
    weight = norm.pdf(grid) * (grid[1] - grid[0])

    def error(codes):
        return float(weight @ np.abs(grid[:, None] - codes).min(axis=1))

    best, rng = error(lloyd_codes(2)), np.random.default_rng(0)
    for _ in range(20):
        assert error(lloyd_codes(2) + 0.02 * rng.standard_normal(4)) > best


@pytest.mark.parametrize("bits", [0, 9, 2.0, True, "2"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(UsageError, match="1 to 8"):
        lloyd_codes(bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back(bits):
    for n in (1, 7, 8, 9, 1000):
        codes = np.random.default_rng(n).integers(0, 2**bits, n, dtype=np.uint8)
        packed = pack(codes, bits)
        assert packed.dtype == np.uint8
        assert len(packed) == -(-bits * n // 8)
        np.testing.assert_array_equal(unpack(packed, bits, n), codes)


def test_packed_bytes_by_hand():
    assert pack(np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], np.uint8), 1).tolist() == [0b10110000, 0b10000000]
    assert pack(np.array([0b10, 0b01, 0b11], np.uint8), 2).tolist() == [0b10011100]
    assert pack(np.array([0b101, 0b010, 0b111], np.uint8), 3).tolist() == [0b10101011, 0b10000000]


def test_the_stand_alone_loader_reads_the_same_bytes():
    codes = np.random.default_rng(0).integers(0, 8, 21, dtype=np.uint8)
    np.testing.assert_array_equal(loader.unpack(pack(codes, 3), 3, 21), codes)


def test_codes_keep_this_much_energy():
    assert kept_energy(1) == pytest.approx(2 / np.pi, abs=1e-14)
    shares = [kept_energy(bits) for bits in range(1, 9)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=1e-3)
    # By numerical integration.
    grid = np.linspace(-9, 9, 400_001)
    weight = norm.pdf(grid) * (grid[1] - grid[0])
    for bits in (2, 3, 5):
        codes = lloyd_codes(bits)
        nearest = codes[np.searchsorted((codes[1:] + codes[:-1]) / 2, grid)]
        share = (weight @ (grid * nearest)) ** 2 / (weight @ nearest**2)
        assert kept_energy(bits) == pytest.approx(share, abs=1e-5)
