"""What a search says of itself: its tier, its race, its bound on what is left, and where it started from."""

from __future__ import annotations

from autopeft.core.record import Record
from autopeft.report._text import gain_text, search_metric
from autopeft.report.tables import Table

__all__ = ["race_table", "search_notes"]


def search_notes(record: Record) -> tuple[str, ...]:
    """One sentence each; none for a record that says nothing of it."""
    facts, metric = record.search, search_metric(record)
    notes = []
    if facts.get("tier"):
        notes.append(f"Tier `{facts['tier']}`: the costs below count towards it, baselines and the end apart.")
    if bound := facts.get("certificate"):
        notes.append(
            f"With {bound['confidence']:.0%} confidence no setting of the knobs is better than the best one found by "
            f"more than {gain_text(metric, bound['delta']).lstrip('+')} (from {bound['trials']} values; a Gaussian "
            "process over the knobs is assumed)."
        )
    if race := facts.get("race"):
        notes.append(
            f"A race of {race['entered']} candidates; seeds alone move the loss by {race['sigma_seed']:.3g} "
            f"(from {race['replicates']} repeated trainings)."
        )
    notes += [
        f"Started from trial {point['trial']} of {point['run']}, {gain_text(metric, point['gain'])} over its default."
        for point in facts.get("warm_start", ())
    ]
    return tuple(notes)


def race_table(record: Record) -> Table:
    """Rung by rung who ran and how far behind the leader; empty when nothing was raced."""
    rows = []
    for place, rung in enumerate(record.search.get("race", {}).get("rungs", ()), start=1):
        for arm in rung["arms"]:
            behind = f"{arm['behind']:+.4f}" if "behind" in arm else ""
            bar = f"{arm['bar']:.4f}" if "bar" in arm else ""
            fate = "goes on" if arm["kept"] else "clearly behind" if arm.get("worse") else "left out"
            loss = f"{arm['nll']:.4f}" if arm.get("nll") is not None else arm["status"]
            rows.append((str(place), str(rung["epochs"]), arm["name"], loss, behind, bar, fate))
    header = ("rung", "epochs", "candidate", "nll", "behind", "bar", "fate")
    return Table("Race", header, tuple(rows), "rrlrrrl")
