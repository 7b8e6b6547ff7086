from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autopeft.methods._bracket import Bracket, within
from autopeft.methods._sparsifiers import Cut, Sparsifier, dense_cut, kept_entries, streamed_cut


def in_tiles(kernel: Tensor, width: int) -> Iterator[Tensor]:
    return (kernel[:, i : i + width] for i in range(0, kernel.shape[1], width))


def streamed(kernel: Tensor, kept: int, width: int) -> Cut:
    return streamed_cut(lambda: in_tiles(kernel, width), kernel.numel(), kept, kernel)


def by_sorting(kernel: Tensor, kept: int) -> Tensor:
    """The mask, from a stable sort of the entries input by input."""
    flat = kernel.abs().T.reshape(-1)
    mask = torch.zeros_like(flat)
    mask[torch.sort(flat, descending=True, stable=True).indices[:kept]] = 1
    return mask.view(kernel.shape[::-1]).T


@pytest.mark.parametrize(
    ("sparsity", "entries", "kept"),
    [(0.9, 589_824, 58_982), (0.0, 10, 10), (0.5, 6, 3), (0.1, 10, 9), (0.3, 10, 7), (0.995, 100, 0), (0.7, 3, 0)],
)
def test_kept_entries_by_hand(sparsity: float, entries: int, kept: int) -> None:
    """`0.3 * 10` is 3 and not a little more: the decimal counts, not its binary neighbour."""
    assert kept_entries(sparsity, entries) == kept


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 1e-30, float("inf")]), min_size=12, max_size=12),
    st.integers(0, 12),
    st.integers(1, 4),
    st.booleans(),
)
def test_cuts_equal_sorting_under_ties(values: list[float], kept: int, width: int, double: bool) -> None:
    kernel = torch.tensor(values, dtype=torch.float64 if double else torch.float32).view(3, 4)
    expected = by_sorting(kernel, kept)
    for cut in (dense_cut(kernel, kept), streamed(kernel, kept, width)):
        parts = [cut.mask(t.abs(), 3 * width * i) for i, t in enumerate(in_tiles(kernel, width))]
        assert torch.equal(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 100])
def test_streamed_level_is_the_exact_value(dtype: torch.dtype, width: int) -> None:
    kernel = torch.randn(31, 40, dtype=dtype)
    kernel[3, 5] = kernel[20, 21] = kernel[7, 2]
    for kept in (0, 1, 17, 600, 1239, 1240):
        one, other = dense_cut(kernel, kept), streamed(kernel, kept, width)
        assert torch.equal(one.level, other.level)
        assert one.bound == other.bound
        assert int(one.mask(kernel.abs(), 0).sum()) == kept


@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 1.25, -2.0, 3.0, math.inf, math.nan]), min_size=12, max_size=12),
    st.integers(1, 12),
    st.floats(0, 3.5),
    st.floats(0, 3.5),
    st.booleans(),
)
def test_a_range_holds_the_rank_or_says_no(values: list[float], rank: int, one: float, other: float, double: bool):
    """Against a sort, in which what is no number comes last; a range that misses the rank gives nothing."""
    kernel = torch.tensor(values, dtype=torch.float64 if double else torch.float32).view(3, 4)
    low, high = min(one, other), max(one, other)
    found = within(lambda: in_tiles(kernel, 2), rank, low, high, 12)
    ordered = kernel.abs().flatten().sort().values
    level = ordered[rank - 1]
    if float(torch.tensor(low, dtype=kernel.dtype)) <= level <= float(torch.tensor(high, dtype=kernel.dtype)):
        assert found is not None
        assert torch.equal(found[0], level)
        assert found[1] == int((ordered[rank:] == level).sum())
        assert within(lambda: in_tiles(kernel, 2), rank, low, high, 0) is None
    else:
        assert found is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bracket_changes_passes_and_nothing_else(dtype: torch.dtype) -> None:
    """A slowly moving kernel takes one pass, one that jumps takes more; the cut is that of the whole kernel."""
    torch.manual_seed(0)
    kernel, bracket, passes = torch.randn(60, 70, dtype=dtype), Bracket(), []

    def sweep() -> Iterator[Tensor]:
        passes[-1] += 1
        return in_tiles(kernel, 9)

    for scale in (1.0, 1.001, 1.002, 1.005, 5.0, 1.0, 1e-6, 1.0, 0.0, 1.0, 1.0):
        kernel = torch.randn(60, 70, dtype=dtype).mul_(1e-4).add_(kernel).mul_(scale)
        if not scale:
            kernel = torch.randn(60, 70, dtype=dtype)
        passes.append(0)
        expected, found = dense_cut(kernel, 420), streamed_cut(sweep, 4200, 420, kernel, bracket)
        assert (float(found.level), found.bound) == (float(expected.level), expected.bound)
    assert passes[1] == passes[2] == passes[3] == passes[5] == 1
    assert min(passes[0], passes[4]) > 1


def test_constant_kernel_is_neither_empty_nor_dense() -> None:
    """Oracle T17."""
    kernel = torch.full((5, 4), -2.0)
    for kept in range(21):
        for cut in (dense_cut(kernel, kept), streamed(kernel, kept, 1)):
            assert cut.mask(kernel.abs(), 0).T.reshape(-1).tolist() == [1.0] * kept + [0.0] * (20 - kept)


def test_more_entries_than_quantile_takes() -> None:
    """Oracle T17: 2^24 + 4096 entries, the count exact and the level that of a sort of the neighbourhood."""
    shape = (4096, 4097)
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kernel.view(-1)[::7] = 0.25
    entries = kernel.numel()
    assert entries > 2**24
    kept = kept_entries(0.8, entries)
    cut = streamed(kernel, kept, 512)
    masks = [cut.mask(t.abs(), 4096 * 512 * i) for i, t in enumerate(in_tiles(kernel, 512))]
    assert sum(int(m.count_nonzero()) for m in masks) == kept
    magnitude = kernel.abs_()
    assert int((magnitude > cut.level).sum()) <= kept
    assert int((magnitude >= cut.level).sum()) > kept


@pytest.mark.parametrize("name", ["soft", "square", "hard", "none"])
def test_in_place_equals_the_graph(name: str) -> None:
    kernel = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    offset, sparsifier = torch.randn(8, dtype=torch.float64), Sparsifier(name)  # type: ignore[arg-type]
    cut = None if name == "none" else dense_cut(kernel, 20)
    change = sparsifier.apply(kernel, cut, 0, offset)
    up = torch.randn_like(change)
    change.backward(up)
    torch.testing.assert_close(sparsifier.apply_(kernel.detach().clone(), cut, 0, offset), change.detach())
    torch.testing.assert_close(sparsifier.pull_(up.clone(), kernel.detach(), cut, 0), kernel.grad)


def test_slopes_by_hand() -> None:
    """K = (-3, 2, 1), one zeroed: t = 1."""
    slopes = {"soft": [5.0, 3.0, 0.0], "square": [3.0, 2.0, 0.0], "hard": [1.0, 1.0, 0.0]}
    changes = {"soft": [-6.0, 2.0, 0.0], "square": [-9.0, 4.0, 0.0], "hard": [-3.0, 2.0, 0.0]}
    kernel = torch.tensor([[-3.0, 2.0, 1.0]])
    cut = dense_cut(kernel, 2)
    assert (float(cut.level), cut.bound) == (1.0, 0)
    for name, expected in slopes.items():
        sparsifier = Sparsifier(name)  # type: ignore[arg-type]
        assert sparsifier.pull_(torch.ones(1, 3), kernel, cut, 0).tolist() == [expected]
        assert sparsifier.apply_(kernel.clone(), cut, 0, None).tolist() == [changes[name]]
