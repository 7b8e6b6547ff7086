from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from autopeft.errors import DataError, UsageError
from autopeft.tasks.cut import CutRule, cut, quotas
from autopeft.tasks.sources.source import Part, Sample, Source


def blank() -> Image.Image:
    return Image.new("RGB", (2, 2))


def samples(sizes: list[int], prefix: str = "") -> tuple[Sample, ...]:
    return tuple(Sample(f"{prefix}{c}/{i}", c, blank) for c, n in enumerate(sizes) for i in range(n))


def source(**parts: list[int]) -> Source:
    n = len(next(iter(parts.values())))
    found: dict[Part, tuple[Sample, ...]] = {p: samples(s, f"{p}/") for p, s in parts.items()}  # type: ignore[misc]
    return Source("the data", tuple(f"c{c}" for c in range(n)), found)


def counted(found: tuple[Sample, ...]) -> Counter[int]:
    return Counter(s.label for s in found)


SIZES = st.lists(st.integers(3, 40), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 5), st.floats(0.05, 0.45), st.floats(0.05, 0.45))
def test_a_tree_is_cut_disjointly_stratified_and_whole(sizes: list[int], seed: int, val: float, test: float) -> None:
    found = cut(source(all=sizes), CutRule(seed, val, test))
    names = [s.name for split in found.values() for s in split]
    assert len(names) == len(set(names)) == sum(sizes)
    free = min(sizes) * min(val, test) >= 1 and min(sizes) * (1 - val - test) >= 2
    # Rounding moves a class by less than 1, once in each cut, and the split's size by at most a half. Where a small
    # class needs the minimum of one, larger classes make up for it, and only the minimum holds.
    for split, share, bound in (("test", test, 1.5), ("outer", val, 2.5), ("inner", 1 - val - test, 3.5)):
        counts = counted(found[split])  # type: ignore[index]
        assert all(counts[label] >= 1 for label in range(len(sizes)))
        if free:
            assert all(abs(counts[label] - share * n) < bound for label, n in enumerate(sizes))
    assert cut(source(all=sizes), CutRule(seed, val, test)) == found


@settings(max_examples=30, deadline=None)
@given(SIZES, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_decide(sizes: list[int], random: object) -> None:
    plain = source(all=sizes)
    shuffled = list(plain.parts["all"])
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = Source("the data", plain.classes, {"all": tuple(shuffled)})
    ours, theirs = cut(plain, CutRule(3)), cut(other, CutRule(3))
    assert all({s.name for s in ours[k]} == {s.name for s in theirs[k]} for k in ours)


def test_the_seed_decides() -> None:
    first, second = (cut(source(all=[20, 20]), CutRule(seed)) for seed in (0, 1))
    assert {s.name for s in first["test"]} != {s.name for s in second["test"]}


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_a_balanced_tree_is_cut_60_20_20(n: int) -> None:
    found = cut(source(all=[n, n]), CutRule())
    assert {split: len(s) for split, s in found.items()} == {"inner": 1.2 * n, "outer": 0.4 * n, "test": 0.4 * n}


def test_train_and_val_cut_outer_from_train() -> None:
    found = cut(source(train=[20, 10], val=[4, 6]), CutRule())
    assert counted(found["inner"]) == {0: 16, 1: 8}
    assert counted(found["outer"]) == {0: 4, 1: 2}
    assert {s.name for s in found["test"]} == {s.name for s in samples([4, 6], "val/")}


def test_train_and_test_cut_outer_from_train() -> None:
    found = cut(source(train=[20, 10], test=[4, 6]), CutRule(val_frac=0.5))
    assert counted(found["outer"]) == {0: 10, 1: 5}
    assert counted(found["test"]) == {0: 4, 1: 6}


def test_three_parts_are_kept() -> None:
    parts = source(train=[5, 5], val=[3, 3], test=[2, 2])
    found = cut(parts, CutRule())
    assert (found["inner"], found["outer"], found["test"]) == tuple(parts.parts.values())


def test_a_sources_own_counts_hold_unless_shares_are_asked_for() -> None:
    whole = Source("the data", ("a", "b"), {"all": samples([50, 50])}, counts=(20, 30, 50))
    assert [len(s) for s in cut(whole, CutRule()).values()] == [20, 30, 50]
    assert [len(s) for s in cut(whole, CutRule(val_frac=0.1)).values()] == [70, 10, 20]
    spare = Source("the data", ("a", "b"), {"all": samples([80, 80])}, counts=(20, 30, 50))
    assert [len(s) for s in cut(spare, CutRule()).values()] == [20, 30, 50]
    assert [len(s) for s in cut(spare, CutRule(max_samples=50)).values()] == [30, 10, 10]


def test_limits_are_stratified() -> None:
    found = cut(source(train=[60, 40], test=[30, 20]), CutRule(max_samples=75, max_inner=20))
    assert counted(found["test"]) == {0: 15, 1: 10}
    assert counted(found["outer"]) == {0: 6, 1: 4}
    assert counted(found["inner"]) == {0: 12, 1: 8}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 2))
def test_quotas_take_what_is_asked_for_where_possible(sizes: list[int], take: int, keep: int) -> None:
    assume(take <= sum(sizes))
    found = quotas(sizes, take, keep)
    high = [max(n - keep, 0) for n in sizes]
    low = [min(1, h) for h in high]
    assert all(lo <= f <= hi for lo, f, hi in zip(low, found, high, strict=True))
    assert sum(found) == min(max(take, sum(low)), sum(high))
    if all(lo <= n * take / sum(sizes) <= hi for lo, n, hi in zip(low, sizes, high, strict=True)):
        assert all(abs(f - n * take / sum(sizes)) < 1 for f, n in zip(found, sizes, strict=True))


def test_quotas_by_hand() -> None:
    # Ideal 2.5, 1.5, 1: floors 2, 1, 1, the fifth goes to the first of the two with remainder one half.
    assert quotas([5, 3, 2], 5, 0) == [3, 1, 1]


def test_a_class_that_is_too_small_is_named_with_its_counts() -> None:
    with pytest.raises(DataError, match="class 'c1' must be in every split and is not: inner 1, outer 1, test 0"):
        cut(source(all=[30, 2]), CutRule())
    with pytest.raises(DataError, match=r"class 'c0'.*inner 1, outer 0, test 5"):
        cut(source(train=[1, 30], test=[5, 5]), CutRule())


@pytest.mark.parametrize(
    "settings",
    [
        {"val_frac": 0.0},
        {"test_frac": 1.0},
        {"val_frac": 0.5, "test_frac": 0.5},
        {"val_frac": 0.8},
        {"max_samples": 0},
        {"max_inner": -1},
    ],
)
def test_bad_rules_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        CutRule(**settings)  # type: ignore[arg-type]


def test_max_inner_below_the_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="max_inner=1 "):
        cut(source(all=[30, 30]), CutRule(max_inner=1))
