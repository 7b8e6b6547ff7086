from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from autopeft.errors import CorruptFile, DataError, UsageError
from autopeft.tasks.sources.source import Part, Sample, Source
from autopeft.tasks.splits import CutRule, Portion, Splits, cut, quotas


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


def made(pixels: dict[str, str], **parts: list[int]) -> Splits:
    found = {split: samples(sizes, f"{split}/") for split, sizes in parts.items()}
    everything = {s.name: s.name for split in found.values() for s in split}
    return Splits.without_leaks(("c0", "c1"), CutRule(), found, everything | pixels)  # type: ignore[arg-type]


def test_duplicates_leave_the_earlier_split_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    same = {"inner/0/0": "x", "outer/1/0": "x", "inner/1/0": "y", "test/0/0": "y", "inner/0/1": "z", "inner/0/2": "z"}
    with caplog.at_level(logging.WARNING, "autopeft.tasks"):
        splits = made(same, inner=[3, 3], outer=[2, 2], test=[2, 2])
    assert splits.removed == 2
    assert splits.inner.names == ("inner/0/1", "inner/0/2", "inner/1/1", "inner/1/2")
    assert (len(splits.outer), len(splits.test)) == (4, 4)
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 6 images of split inner are also in a later split and were left out, such as inner/0/0"
    ]


def test_no_warning_without_duplicates(caplog: pytest.LogCaptureFixture) -> None:
    assert made({}, inner=[3, 3], outer=[2, 2], test=[2, 2]).removed == 0
    assert not caplog.records


def test_a_class_that_vanishes_with_its_duplicates_is_an_error() -> None:
    same = {"inner/0/0": "x", "test/0/0": "x"}
    with pytest.raises(DataError, match=r"class 'c0'.*inner 0, outer 2, test 2 \(1 duplicates removed\)"):
        made(same, inner=[1, 3], outer=[2, 2], test=[2, 2])


def test_splits_are_read_back_identically(tmp_path: Path) -> None:
    splits = made({"inner/0/0": "x", "test/0/0": "x"}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    path = tmp_path / "splits.json"
    splits.write(path)
    assert Splits.read(path) == splits
    assert Splits.read(path).digest == splits.digest
    assert json.loads(path.read_text())["schema"] == "autopeft.splits/1"


def test_the_digest_covers_names_labels_pixels_and_splits() -> None:
    base = made({}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    other_pixels = made({"inner/0/0": "x"}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    inner = base.inner
    swapped = Portion(inner.names, inner.labels[::-1], inner.pixels)
    renamed = Portion(("new", *inner.names[1:]), inner.labels, inner.pixels)
    digests = {base.digest, other_pixels.digest} | {
        Splits(base.classes, base.rule, portion, base.outer, base.test).digest for portion in (swapped, renamed)
    }
    moved = Splits(base.classes, base.rule, base.outer, base.inner, base.test)
    assert len(digests | {moved.digest}) == 5


def test_a_sample_in_two_splits_is_refused() -> None:
    base = made({}, inner=[3, 3], outer=[2, 2], test=[2, 2])
    with pytest.raises(ValueError, match="in two splits"):
        Splits(base.classes, base.rule, base.inner, base.inner, base.test)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("inner"),
        lambda d: d["inner"]["names"].pop(),
        lambda d: d["test"].update(labels=[0] * len(d["test"]["labels"])),
        lambda d: d["rule"].update(val_frac=3.0),
        lambda d: d.update(schema="autopeft.splits/9"),
    ],
)
def test_damaged_splits_are_corrupt(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "splits.json"
    made({}, inner=[3, 3], outer=[2, 2], test=[2, 2]).write(path)
    data = json.loads(path.read_text())
    damage(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptFile, match=r"splits\.json"):
        Splits.read(path)
