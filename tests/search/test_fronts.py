"""Searches with several goals: the whole front, or the first goal within limits on the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from autopeft.core.contracts import Sampler
from autopeft.core.goals import Goals
from autopeft.core.outcome import Outcome
from autopeft.core.record import Trial
from autopeft.core.space import Knob, Space
from autopeft.errors import UsageError
from autopeft.search.gp import GP
from autopeft.search.listing import list_studies
from autopeft.search.nsga2 import NSGA2
from autopeft.search.optuna_study import OptunaSearcher
from autopeft.search.random import Random
from autopeft.search.tpe import TPE

SPACE = Space((Knob("x", 0.0, 1.0, default=0.5), Knob("y", 0.0, 1.0), Knob("kind", choices=("a", "b"))))
BOTH = Goals(("top1", "memorised"), ("maximize", "minimize"))
Open = Callable[..., OptunaSearcher]


@pytest.fixture
def open_two(tmp_path: Path) -> Open:
    def make(goals: Goals, sampler: Sampler, name: str = "front") -> OptunaSearcher:
        return OptunaSearcher.open(
            f"sqlite:///{tmp_path / 'study.db'}", name, SPACE, seed=3, goals=goals, max_epochs=9, sampler=sampler
        )

    return make


def run(searcher: OptunaSearcher, trials: int) -> list[tuple[float, float]]:
    """`top1` grows with x, what is memorised with x^2 and y: the front is y = 0."""
    seen = []
    for _ in range(trials):
        asked = searcher.ask()
        x, y = float(asked.values["x"]), float(asked.values["y"])
        rewards = (x, x**2 + y)
        outcome = Outcome("done", {"top1": rewards[0], "memorised": rewards[1]})
        trial = Trial(asked.number, f"trial {asked.number}", "trial", dict(asked.values), "d", 1, {}, outcome, rewards)
        searcher.describe(trial)
        searcher.tell(asked.number, outcome, rewards)
        seen.append(rewards)
    return seen


@pytest.mark.parametrize("sampler", [TPE(startup=3), NSGA2(population=3), GP(startup=3), Random()])
def test_a_front_is_searched_and_nothing_is_stopped(open_two: Open, sampler: Sampler) -> None:
    searcher = open_two(BOTH, sampler)
    run(searcher, 4)
    number = searcher.ask().number
    assert not searcher.report(number, 1, -100.0), "one goal alone must not judge"
    assert not searcher.report(number, 3, -100.0)
    searcher.tell(number, Outcome("failed", reason="diverged"))
    run(searcher, 1)
    assert searcher.count() == 6
    trials = searcher.finished()
    rewards = [t.rewards for t in trials if t.rewards]
    best = searcher.best("trial")
    assert best is not None
    assert best.rewards == rewards[BOTH.choose(rewards)]
    assert searcher.study.metric_names == ["top1", "memorised"]


def test_the_estimator_finds_more_of_the_front_than_chance(open_two: Open) -> None:
    """The mean distance to the front, which is `y`, in the second half of the search."""

    def late(name: str, chosen: Sampler) -> float:
        seen = run(open_two(BOTH, chosen, name), 30)[15:]
        return sum(m - t * t for t, m in seen) / 15

    assert late("learnt", TPE(startup=10)) < 0.6 * late("drawn", Random())


def test_generations_are_counted_off_and_parents_are_the_best_of_the_last() -> None:
    """Of four trials the two on the front become parents: without mutation children have nothing but their genes."""
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    spread = {"x": FloatDistribution(0.0, 1.0)}
    rows = [(0.1, (0.1, 0.9)), (0.2, (0.9, 0.5)), (0.3, (0.2, 0.8)), (0.4, (0.5, 0.1))]
    trials = [create_trial(params={"x": x}, distributions=spread, values=v) for x, v in rows]
    failed = create_trial(state=TrialState.FAIL, params={"x": 0.5}, distributions=spread)
    sampler = NSGA2(population=2)
    view = sampler.view([*trials, failed], directions)
    assert [t.system_attrs["NSGAIISampler:generation"] for t in view] == [0, 0, 1, 1, 2]
    assert view[-1].values == [0.1, 0.9], "a failed trial counts as the worst in each goal"
    assert all("NSGAIISampler:generation" not in t.system_attrs for t in trials)
    baseline = create_trial(params={"x": 0.9}, distributions=spread, values=(0.3, 0.3), user_attrs={"role": "baseline"})
    assert len(sampler.view([baseline, *trials[:1]], directions)) == 1, "no random draw is saved"
    joined = sampler.view([baseline, *trials[:3]], directions)
    assert [t.system_attrs["NSGAIISampler:generation"] for t in joined] == [0, 0, 0, 1]
    mirror = optuna.create_study(directions=directions, sampler=sampler.make(0))
    mirror.add_trials(view[:4])
    assert {t.params["x"] for t in mirror.sampler.get_parent_population(mirror, 2)} == {0.2, 0.4}  # type: ignore[attr-defined]


def test_the_first_goal_within_a_limit(open_two: Open) -> None:
    goals = Goals(("top1", "memorised"), ("maximize", "minimize"), limits={"memorised": 0.36})
    searcher = open_two(goals, TPE(startup=8))
    seen = run(searcher, 30)
    best = searcher.best("trial")
    assert best is not None
    feasible = [t for t, m in seen if m <= 0.36]
    assert best.rewards[0] == max(feasible)
    assert best.rewards[1] <= 0.36
    # The optimum is x = 0.6; without the limit the search would sit at x = 1.
    assert max(feasible) > 0.45
    frozen = searcher.study.get_trials(deepcopy=False)
    assert all(t.constraints == {"memorised": pytest.approx(m - 0.36)} for t, (_, m) in zip(frozen, seen, strict=True))


def test_one_goal_within_a_limit_is_stopped_at_rungs_and_not_measured_against_what_breaks_it(open_two: Open) -> None:
    goals = Goals(("top1", "memorised"), ("maximize", "minimize"), limits={"memorised": 0.5})
    searcher = open_two(goals, TPE())

    def one(values: float, memorised: float) -> bool:
        number = searcher.ask().number
        stopped = searcher.report(number, 1, values) or searcher.report(number, 3, values)
        if stopped:
            searcher.tell(number, Outcome("pruned", curve=((1, values),), reason="stopped"))
        else:
            outcome = Outcome("done", {"top1": values, "memorised": memorised})
            searcher.tell(number, outcome, (values, memorised))
        return stopped

    assert not any(one(0.9, 0.9) for _ in range(6)), "six results that break the limit"
    assert not one(0.5, 0.1), "judged against them it would have been stopped"
    assert any([one(0.4, 0.1) for _ in range(3)] + [one(0.01, 0.1) for _ in range(4)])
    assert any(t.state == TrialState.PRUNED for t in searcher.study.get_trials())


def test_rewards_have_one_number_per_goal(open_two: Open) -> None:
    searcher = open_two(BOTH, TPE())
    number = searcher.ask().number
    with pytest.raises(UsageError, match="has 1 rewards, the goals are top1, memorised"):
        searcher.tell(number, Outcome("done", {"top1": 0.5}), (0.5,))


def test_a_front_is_listed_by_its_first_goal(open_two: Open, tmp_path: Path) -> None:
    seen = run(open_two(BOTH, Random()), 3)
    rows = list_studies(f"sqlite:///{tmp_path / 'study.db'}")
    assert rows[0]["best"] == max(t for t, _ in seen)
