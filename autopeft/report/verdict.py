"""What a run has shown, in one honest sentence."""

from __future__ import annotations

from dataclasses import dataclass

from autopeft.core.outcome import Outcome
from autopeft.core.record import Contender, Record
from autopeft.report._text import gain_text, metric_text, search_metric

__all__ = ["Verdict", "verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first line of every report.

    Attributes:
        headline: the sentence.
        gained: whether the winner's mean paired gain over every baseline is above 0; None when nothing was compared.
        sure: whether also every 95 % interval of those gains lies above 0.
    """

    headline: str
    gained: bool | None
    sure: bool


def verdict(record: Record) -> Verdict:
    """Judge a run by its winner's paired gains over the outside baselines.

    The unsearched default plan is ours and no outside baseline: it is shown, and not part of the judgement. A winner
    that is itself a baseline has gained nothing.
    """
    metric = search_metric(record)
    if not record.contenders:
        return _unfinished(record, metric)
    winner, *others = record.contenders
    outside = [c for c in others if c.role == "baseline"]
    score = _score(winner, metric)
    if winner.role == "baseline":
        return Verdict(f"No gain over {winner.name}: the baseline itself came out best ({score}).", False, False)
    if not outside:
        return Verdict(f"{winner.name} reaches {score}; no baseline was retrained, so no gain is claimed.", None, False)
    beaten_by = [c for c in outside if c.gain <= 0]
    if beaten_by:
        names = " and ".join(f"{c.name} ({gain_text(metric, c.gain)})" for c in beaten_by)
        return Verdict(f"No gain over {names}: {winner.name} reaches {score}.", False, False)
    closest = min(outside, key=lambda c: c.gain)
    gain = gain_text(metric, closest.gain)
    if any(c.interval[0] <= 0 for c in outside):
        doubtful = " and ".join(c.name for c in outside if c.interval[0] <= 0)
        return Verdict(
            f"{winner.name} reaches {score}, {gain} over the best baseline ({closest.name}), "
            f"but the 95 % interval of the gain over {doubtful} includes 0.",
            True,
            False,
        )
    low, high = (gain_text(metric, v) for v in closest.interval)
    return Verdict(
        f"{winner.name} reaches {score}, {gain} [{low}, {high}] over the best baseline ({closest.name}).", True, True
    )


def _unfinished(record: Record, metric: str) -> Verdict:
    best = next((t for t in record.trials if t.number == record.best), None)
    if best is None or metric not in best.outcome.metrics:
        return Verdict("No trial is done yet.", None, False)
    value = metric_text(metric, best.outcome.metrics[metric])
    return Verdict(
        f"Best so far: {best.name} with {metric} {value} on the {best.outcome.split} split, one seed; "
        "nothing is retrained with several seeds yet, so no gain is claimed.",
        None,
        False,
    )


def _score(contender: Contender, metric: str) -> str:
    done = [o for o in contender.outcomes if metric in o.metrics]
    if not done:
        return f"no {metric}"
    mean = sum(o.metrics[metric] for o in done) / len(done)
    seeds = "1 seed" if len(done) == 1 else f"{len(done)} seeds"
    return f"{metric} {metric_text(metric, mean)} on the {_split(done)} split ({seeds})"


def _split(outcomes: list[Outcome]) -> str:
    return outcomes[0].split
