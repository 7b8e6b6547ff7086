"""What a study's trials are to us: role, place in the search, whether they count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optuna.trial import FrozenTrial, TrialState

from autopeft.core.record import Role

__all__ = ["counted", "finished", "is_replaced", "ordinal", "place", "role_of", "with_state"]


def role_of(trial: FrozenTrial) -> Role:
    """The role of a trial; a trial that somebody else put into the study is a `trial`."""
    role: Role = trial.user_attrs.get("role", "trial")
    return role


def is_replaced(trial: FrozenTrial) -> bool:
    """Whether its process died and another trial stands in its place."""
    return bool(trial.user_attrs.get("replaced", False))


def ordinal(number: int, trials: Iterable[FrozenTrial]) -> int:
    """How many searched trials come before the trial of this number, replaced ones left out.

    A trial that is asked again after its process died has another number but the same ordinal, so that what depends on
    the ordinal (the sampler's seed, the bracket) is as if nothing had happened.
    """
    return sum(1 for t in trials if t.number < number and role_of(t) == "trial" and not is_replaced(t))


def place(trial: FrozenTrial, trials: Iterable[FrozenTrial]) -> int:
    """Place of a trial among those of any role, from 0: what the record numbers it by.

    A trial that is asked again keeps the place of the one it stands in for, and baselines whose process died leave
    none, so that a search that was killed and continued numbers its trials as one that was not.
    """
    first = trial.user_attrs.get("origin", trial.number)
    return sum(
        1
        for t in trials
        if t.number < first and "retry_of" not in t.user_attrs and (role_of(t) == "trial" or not is_replaced(t))
    )


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count in a total: searched ones that are complete, pruned or failed for good."""
    return [t for t in trials if role_of(t) == "trial" and t.state.is_finished() and not is_replaced(t)]


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Every trial with an outcome, of any role."""
    return [t for t in trials if t.state.is_finished() and not is_replaced(t)]


def with_state(trials: Sequence[FrozenTrial], state: TrialState) -> list[FrozenTrial]:
    """The trials in this state."""
    return [t for t in trials if t.state == state]
