from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.scoring.select import Ranking, top_entries


def by_sorting(tensors: list[Tensor], tau: int) -> list[list[int]]:
    """The oracle: a full sort in Python."""
    rows = [(-v, i, j) for i, t in enumerate(tensors) for j, v in enumerate(t.flatten().tolist())]
    chosen: list[list[int]] = [[] for _ in tensors]
    for _, i, j in sorted(rows)[:tau]:
        chosen[i].append(j)
    return [sorted(c) for c in chosen]


def as_lists(tensors: list[Tensor]) -> list[list[int]]:
    return [t.tolist() for t in tensors]


def test_hand_worked() -> None:
    a, b = torch.tensor([[1.0, 5.0], [3.0, 0.0]]), torch.tensor([3.0, 4.0])
    assert as_lists(top_entries([a, b], 3)) == [[1, 2], [1]]  # 5, 4, then the 3 of the earlier tensor
    assert as_lists(top_entries([b, a], 3)) == [[0, 1], [1]]
    assert Ranking([a, b]).counts(4) == [2, 2]


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=12), min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 1e-41, 1e-300, 3.7e12]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    share=st.floats(0, 1),
)
def test_equals_full_sort_with_heavy_ties(
    tensors: list[list[int]], scale: float, dtype: torch.dtype, share: float
) -> None:
    given_ = [torch.tensor(t, dtype=dtype) * scale for t in tensors]
    tau = round(share * sum(t.numel() for t in given_))
    expected = by_sorting(given_, tau)
    ranking = Ranking(given_)
    assert as_lists(ranking.indices(tau)) == expected
    assert ranking.counts(tau) == [len(e) for e in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_cut_of_close_values(dtype: torch.dtype) -> None:
    """Many values within one bin of the histogram, so that the exact order inside of it decides."""
    generator = torch.Generator().manual_seed(0)
    tensors = [1 + 1e-3 * torch.rand(n, generator=generator, dtype=dtype) for n in (40, 1, 25)]
    tensors[2][:5] = tensors[0][3]
    ranking = Ranking(tensors)
    for tau in range(len(ranking) + 1):
        expected = by_sorting(tensors, tau)
        assert as_lists(ranking.indices(tau)) == expected
        assert [ranking.indices_of(i, tau).tolist() for i in range(3)] == expected


def test_tensor_order_does_not_matter_without_ties() -> None:
    """Oracle T10."""
    values = torch.randperm(600, generator=torch.Generator().manual_seed(1)).float()
    tensors = list(values.split([100, 200, 300]))
    straight = top_entries(tensors, 123)
    turned = top_entries(tensors[::-1], 123)[::-1]
    assert as_lists(straight) == as_lists(turned)


def test_counts_grow_one_at_a_time() -> None:
    tensors = [torch.rand(30, generator=torch.Generator().manual_seed(2)).round(decimals=1) for _ in range(3)]
    ranking = Ranking(tensors)
    before = ranking.counts(0)
    assert before == [0, 0, 0]
    for tau in range(1, len(ranking) + 1):
        after = ranking.counts(tau)
        assert sum(after) == tau
        assert all(a >= b for a, b in zip(after, before, strict=True))
        before = after


def test_larger_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopeft.scoring.select._CHUNK", 7)
    tensors = [torch.rand(50, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert as_lists(top_entries(tensors, 33)) == by_sorting(tensors, 33)


def test_views_and_negative_zero() -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    assert as_lists(top_entries([whole[2:4], whole[4:6]], 9)) == [[7], list(range(8))]
    assert as_lists(top_entries([torch.tensor([-0.0, 0.0, 1.0])], 2)) == [[0, 2]]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_refuses_values_without_a_rank(bad: float) -> None:
    with pytest.raises(UsageError, match="tensor 1"):
        Ranking([torch.ones(3), torch.tensor([1.0, bad])])


def test_refuses_mixed_types_and_bad_counts() -> None:
    with pytest.raises(UsageError, match="one type"):
        Ranking([torch.ones(2), torch.ones(2, dtype=torch.float64)])
    with pytest.raises(UsageError, match="between 0 and 2"):
        top_entries([torch.ones(2)], 3)
    with pytest.raises(UsageError, match="between 0 and 2"):
        Ranking([torch.ones(2)]).counts(-1)


def test_empty() -> None:
    assert Ranking([]).counts(0) == []
    assert as_lists(top_entries([torch.empty(0), torch.ones(1)], 1)) == [[], [0]]
