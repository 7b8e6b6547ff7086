from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autopeft.search.history import is_replaced, role_of

TOTAL = 7


def _trials(url: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="kill", storage=url).trials


def _history(url: str) -> list[tuple[Any, ...]]:
    """What was tried and what came of it, in order; numbers and times left out."""
    kept = [t for t in _trials(url) if not is_replaced(t)]
    return [(role_of(t), t.params, t.state.name, t.value, t.intermediate_values) for t in kept]


def test_killed_and_continued_equals_unkilled(start: Callable[..., Any], tmp_path: Path) -> None:
    """`kill -9` in the middle of a searched trial, and of its second attempt."""
    whole, parts = (f"sqlite:///{tmp_path / name}.db" for name in ("whole", "parts"))
    calm = start(whole, TOTAL, 0.0, "--baselines")
    calm.go()
    first = start(parts, TOTAL, 0.0, "--baselines", "--hang=5:2")  # when TPE has begun to learn, with two reports
    first.go()
    first.until("hangs")
    first.kill()
    calm.until("finished")
    second = start(parts, TOTAL, 0.0, "--baselines", "--hang=0:0")
    second.go()
    second.until("hangs")
    second.kill()
    third = start(parts, TOTAL, 0.0, "--baselines")
    third.go()
    third.until(f"finished {TOTAL}")

    assert "reaped 7" in second.lines
    assert "reaped 8" in third.lines
    assert _history(parts) == _history(whole)
    trials = _trials(parts)
    counts = Counter(t.state for t in trials if role_of(t) == "trial" and not is_replaced(t))
    assert counts[TrialState.COMPLETE] + counts[TrialState.PRUNED] == TOTAL == counts.total()
    assert counts[TrialState.PRUNED] > 0
    keys = [t.user_attrs["key"] for t in trials if t.state == TrialState.COMPLETE and "key" in t.user_attrs]
    assert len(set(keys)) == len(keys)
    retried = [(t.user_attrs["retry_of"], t.user_attrs["origin"]) for t in trials if "retry_of" in t.user_attrs]
    assert retried == [(7, 7), (8, 7)]
    assert sum(role_of(t) == "baseline" for t in trials) == 2
