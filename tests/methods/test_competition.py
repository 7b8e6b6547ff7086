from __future__ import annotations

import copy
import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Competition
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.errors import Preempted, UsageError
from autopeft.methods._competition import Clock, Competing, Importance, cubic, proportional, share_out
from autopeft.methods.rank_pool import RankPool
from autopeft.methods.snella import SNELLA
from autopeft.methods.sparse_pool import SparsePool
from autopeft.testing._method_cases import ground_of
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training.checkpoint import Checkpoint
from autopeft.training.loop import fit
from autopeft.training.preempt import preemptible
from autopeft.training.settings import LearningRates, TrainSettings

# The schedule


def test_cubic_golden() -> None:
    """Oracle T21."""
    n = 10**7
    values = [cubic(t, 0, 100, n, n // 5) for t in (0, 50, 90, 99, 100, 130)]
    assert values == [n, 3_000_000, 2_008_000, 2_000_008, 2_000_000, 2_000_000]


def test_cubic_is_exact_beyond_what_floats_hold() -> None:
    assert cubic(1, 0, 3, 10**20 + 27, 0) == (10**20 + 27) * 8 // 27


@given(st.integers(1, 300), st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))
def test_a_clock_ends_before_the_training_does(total: int, warmup: int, cooldown: int, every: int) -> None:
    clock = Clock(total, warmup / 100, cooldown / 100, every)
    due = [step for step in range(total) if clock.due(step)]
    assert due[-1] == clock.last <= total - 1
    assert total - clock.last >= cooldown / 100 * total
    assert all(step > clock.first for step in due[:-1])
    assert clock.first <= warmup / 100 * total
    volumes = [cubic(step, clock.first, clock.last, 1000, 17) for step in range(total)]
    assert volumes == sorted(volumes, reverse=True)
    assert volumes[-1] == 17
    assert total == 1 or clock.last == 0 or volumes[0] == 1000


# Sharing out


def test_water_filling_golden() -> None:
    """Oracle T22."""
    assert share_out([0.7, 0.2, 0.1], [100, 100, 400], 300) == (100, 100, 100)
    assert share_out([0.7, 0.2, 0.1], [100, 100, 400], 600) == (100, 100, 400)
    assert share_out([0.7, 0.2, 0.1], [100, 100, 400], 10) == (7, 2, 1)
    # 10 / 3 each; the odd one goes to the larger cap.
    assert share_out([1.0, 1.0, 1.0], [5, 9, 5], 10) == (3, 4, 3)
    assert share_out([3.0, 1.0], [100, 100], 20, [0, 10]) == (8, 12)


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [math.nan] * 3, [-1.0, 0.0, math.inf]])
def test_without_scores_shares_follow_the_size(scores: list[float]) -> None:
    assert share_out(scores, [100, 100, 400], 60) == (10, 10, 40)


def test_the_unscored_take_what_is_left() -> None:
    assert share_out([0.0, 1.0, 0.0], [100, 50, 300], 90) == (10, 50, 30)
    assert share_out([0.0, 1.0, math.nan], [100, 50, 300], 40) == (0, 40, 0)


def test_volumes_beyond_float32() -> None:
    caps = [2**31 + 1, 2**33 + 3, 5]
    assert sum(share_out([1.0, 1.0, 1e-30], caps, 2**33 + 11)) == 2**33 + 11


_MEMBERS = st.lists(st.tuples(st.integers(0, 50).map(float), st.integers(1, 40)), min_size=1, max_size=7)


@given(_MEMBERS, st.integers(0, 300), st.floats(0, 0.99))
def test_laws_of_sharing_out(members: list[tuple[float, int]], volume: int, floor: float) -> None:
    scores, caps = [s for s, _ in members], [c for _, c in members]
    volume = min(volume, sum(caps))
    least = proportional(floor, caps, volume)
    assert sum(least) <= volume
    found = share_out(scores, caps, volume, least)
    assert sum(found) == volume
    assert all(low <= n <= cap for low, n, cap in zip(least, found, caps, strict=True))
    assert share_out([4 * s for s in scores], caps, volume, least) == found
    order = sorted(range(len(members)), key=lambda i: members[i])
    permuted = share_out([scores[i] for i in order], [caps[i] for i in order], volume, [least[i] for i in order])
    pairs = [(members[i], n) for i, n in zip(order, permuted, strict=True)]
    assert sorted(pairs) == sorted(zip(members, found, strict=True))


@given(_MEMBERS, st.integers(0, 300))
def test_water_levels(members: list[tuple[float, int]], volume: int) -> None:
    """The uncapped are in proportion, and nobody capped is owed less than its cap: the level found by bisection."""
    scores, caps = [s + 1 for s, _ in members], [c for _, c in members]
    volume = min(volume, sum(caps))
    low, high = 0.0, 1e4
    for _ in range(80):
        level = (low + high) / 2
        filled = sum(min(c, level * s) for s, c in zip(scores, caps, strict=True))
        low, high = (level, high) if filled < volume else (low, level)
    for s, c, n in zip(scores, caps, share_out(scores, caps, volume), strict=True):
        assert abs(n - min(c, high * s)) < 1 + 1e-6


# Importance


def test_importance_of_a_constant_sensitivity() -> None:
    """Oracle T23."""
    parameter = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    watch = Importance(parameter, 0.85, 0.85)
    gradient = torch.tensor([0.5, 1.0], dtype=torch.float64)
    steps = 7
    for _ in range(steps):
        parameter.grad = None
        (parameter * gradient).sum().backward()
    i = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(watch.mean, i * (1 - 0.85**steps))
    torch.testing.assert_close(watch.spread, (1 - 0.85) * steps * 0.85**steps * i)
    torch.testing.assert_close(watch.score(), watch.mean * watch.spread)


def test_importance_with_two_rates() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    watch = Importance(parameter, 0.6, 0.9)
    for _ in range(5):
        watch.note(parameter, torch.full((1,), 2.0, dtype=torch.float64))
    spread = (1 - 0.9) * sum(0.9 ** (5 - j) * 2 * 0.6**j for j in range(1, 6))
    assert watch.spread.item() == pytest.approx(spread)


def test_importance_counts_what_is_no_number_as_nothing() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 0.0, 1.0]))
    watch = Importance(parameter, 0.5, 0.5)
    watch.note(parameter, torch.tensor([math.nan, math.inf, 4.0]))
    assert watch.mean.tolist() == [0.0, 0.0, 2.0]


def test_a_copy_keeps_what_is_known_and_follows_nothing() -> None:
    holder = nn.Module()
    holder.p = nn.Parameter(torch.ones(2))
    holder.watch = Importance(holder.p, 0.5, 0.5)
    holder.p.sum().backward()
    twin = copy.deepcopy(holder)
    assert torch.equal(twin.watch.mean, torch.tensor([0.5, 0.5]))
    twin.p.sum().backward()
    assert torch.equal(twin.watch.mean, torch.tensor([0.5, 0.5]))


# In training: 16 steps

METHODS = {
    "snella": (SNELLA(sparsity=0.8, every=2, sparsifier="hard"), 1),
    "rank_pool": (RankPool(start=2.0, every=2), 1),
    "sparse_pool": (SparsePool(every=3), 256),
}
SETTINGS = TrainSettings(epochs=4, lr=LearningRates(matrix=2e-2, entries=2e-2))


@contextmanager
def _inserted(name: str, group: str = "*", **fields: Any) -> Iterator[tuple[Any, Competing]]:
    method, size = METHODS[name]
    method = dataclasses.replace(method, **fields)
    ground = ground_of("vit", torch.float32)
    site = ground.catalog[group]
    chosen = method.select(site, ground.about(site), size)
    places = places_of(ground.catalog, method, site)
    option = Option(site.name, name, size, method.cost(site, size), 0.0, places, chosen)
    plan = Allocation((option,), Budget(10**9))
    with Native().insert(tiny_vit(), ground.catalog, plan, {name: method}, seed=1) as inserted:
        part = inserted.named_adapters()[option.key]
        assert isinstance(part, Competing)
        yield inserted, part


class _Spy(ToyTask):
    """Writes down the shares of every training step; sends a signal to itself during one of them."""

    def __init__(self, part: Competing, at: int = 0) -> None:
        super().__init__()
        self.part, self.at = part, at
        self.seen: list[dict[str, int]] = []

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(self.part.shares())
            if len(self.seen) == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(model, batch)


def _fit(inserted: Any, task: ToyTask, name: str, **kw: Any) -> None:
    fit(inserted, task, SETTINGS, methods={name: METHODS[name][0]}, seed=3, device="cpu", watch=None, **kw)


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_kept_in_every_step_and_exact_at_the_end(name: str) -> None:
    with _inserted(name) as (inserted, part):
        assert isinstance(part, Competition)
        assert part.spent == part.start
        task = _Spy(part)
        trained = inserted.trainable_count()
        _fit(inserted, task, name)
        assert len(task.seen) == 16
        totals = [sum(shares.values()) for shares in task.seen]
        assert totals[-1] == part.spent == part.end
        if name == "sparse_pool":
            assert set(totals) == {part.end}
        else:
            clock = Clock(16, part.method.warmup, part.method.cooldown, 2)
            due = [step for step in range(16) if clock.due(step)]
            allowed = [cubic(step, clock.first, clock.last, part.start, part.end) for step in range(16)]
            held = [max((d for d in due if d <= step), default=0) for step in range(16)]
            assert totals == [allowed[step] for step in held]
            assert totals[0] == part.start > part.end
        assert len({tuple(shares.values()) for shares in task.seen}) > 2
        assert inserted.trainable_count() == trained == sum(p.numel() for p in part.parameters())


def _steps(inserted: Any, part: Competing, steps: range, total: int, seed: int) -> list[dict[str, int]]:
    """Train by hand; the shares in every step."""
    seen = []
    for step in steps:
        inserted.advance(step, total)
        seen.append(part.shares())
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed + step))
        for p in part.parameters():
            p.grad = None
        inserted.model(x).square().sum().backward()
        with torch.no_grad():
            for p in part.parameters():
                p.add_(torch.sign(p.grad) if p.grad is not None else 0, alpha=-1e-2)
    return seen


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=6)
@given(
    st.integers(2, 7), st.integers(1, 3), st.integers(0, 50), st.integers(0, 50), st.integers(1, 6), st.integers(0, 9)
)
def test_invariants_of_any_schedule(name: str, total: int, every: int, warmup: int, cooldown: int, at: int, seed: int):
    """Never above what the schedule allows, exact at the end, and the same shares from a state saved on the way."""
    shares = {"warmup": warmup / 100, "cooldown": cooldown / 100}
    fields = {"every": every, **({"until": 1 - cooldown / 100} if name == "sparse_pool" else shares)}
    at = min(at, total - 1)
    with _inserted(name, **fields) as (inserted, part):
        seen = _steps(inserted, part, range(at), total, seed)
        saved = {key: tensor.clone() for key, tensor in inserted.state().items()}
        watched = {key: tensor.clone() for key, tensor in part.state_dict().items()}
        seen += _steps(inserted, part, range(at, total), total, seed)
        assert part.spent == part.end
    totals = [sum(held.values()) for held in seen]
    if name == "sparse_pool":
        assert set(totals) == {part.end}
    else:
        clock = Clock(total, warmup / 100, cooldown / 100, every)
        due = [step for step in range(total) if clock.due(step)]
        for step, held in enumerate(totals):
            last = max((d for d in due if d <= step), default=0)
            assert held == cubic(last, clock.first, clock.last, part.start, part.end) if due[0] <= step else part.start
    with _inserted(name, **fields) as (inserted, part):
        inserted.load_state(saved)
        part.load_state_dict(watched)
        assert _steps(inserted, part, range(at, total), total, seed) == seen[at:]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [4, 7, 10])
def test_continued_from_a_checkpoint_it_shares_out_alike(name: str, at: int, tmp_path: Path) -> None:
    with _inserted(name) as (inserted, part):
        whole = _Spy(part)
        _fit(inserted, whole, name)
        expected = inserted.state()
    with _inserted(name) as (inserted, part), preemptible():
        first = _Spy(part, at)
        with pytest.raises(Preempted):
            _fit(inserted, first, name, checkpoint=Checkpoint(tmp_path))
    with _inserted(name) as (inserted, part):
        second = _Spy(part)
        _fit(inserted, second, name, checkpoint=Checkpoint(tmp_path))
        assert len(second.seen) == 16 - at
        assert first.seen + second.seen == whole.seen
        found = inserted.state()
    differing = [n for n in expected if not torch.equal(expected[n], found[n])]
    assert found.keys() == expected.keys()
    assert not differing


@pytest.mark.parametrize("name", METHODS)
def test_copies_and_exports_compute_what_was_trained(name: str) -> None:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with _inserted(name) as (inserted, part):
        _fit(inserted, ToyTask(), name)
        shares, trained = part.shares(), inserted.model(x)
        assert copy.deepcopy(part).shares() == shares
        stored, merged = inserted.stored(), inserted.merged_state()
        assert sum(t.numel() for n, t in stored.items() if not n.startswith("head/")) == (
            inserted.allocation.options[0].cost.stored
        )
    with _inserted(name) as (inserted, part):
        inserted.load_stored(stored)
        torch.testing.assert_close(inserted.model(x), trained, rtol=1e-5, atol=1e-6)
        with pytest.raises(UsageError, match="does not fit the file at nothing"):
            part.load_stored({**part.stored(), "nothing": torch.zeros(1)})
    plain = tiny_vit()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(x), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (SNELLA, {"sparsity": 1.0}),
        (SNELLA, {"start_sparsity": 0.95}),
        (SNELLA, {"sparsifier": "none"}),
        (SNELLA, {"every": 0}),
        (SNELLA, {"warmup": 1.0}),
        (SNELLA, {"floor": 1.0}),
        (SNELLA, {"beta_mean": 1.0}),
        (SNELLA, {"coefficient": 0.0}),
        (RankPool, {"start": 0.5}),
        (RankPool, {"strength": -1.0}),
        (RankPool, {"alpha": 0.0}),
        (RankPool, {"cooldown": -0.1}),
        (RankPool, {"beta_spread": 1.5}),
        (SparsePool, {"every": 0}),
        (SparsePool, {"until": 1.1}),
        (SparsePool, {"fraction": -0.1}),
        (SparsePool, {"start": "first"}),
    ],
)
def test_bad_fields(method: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        method(**fields)


def test_phases_that_overlap() -> None:
    with pytest.raises(UsageError, match="together"):
        RankPool(warmup=0.6, cooldown=0.6)
