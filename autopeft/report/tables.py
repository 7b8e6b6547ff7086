"""The tables of a report, as plain text and as markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autopeft.core.outcome import Outcome
from autopeft.core.record import Contender, Record, Trial
from autopeft.report._text import bar, gain_text, metric_text, number, search_metric, share_text, stage_seconds
from autopeft.report.rows import AllocationRow, spending

__all__ = [
    "Table",
    "allocation_table",
    "contender_table",
    "cost_table",
    "environment_table",
    "mix_text",
    "spending_tables",
    "standing_table",
    "trial_table",
]

_FULL = "full_training"
"""What `Record.costs` calls the price of one full training."""

_OTHERS, _LAST = "baselines", "finish"


@dataclass(frozen=True, slots=True)
class Table:
    """A small table of ready texts.

    Attributes:
        title: what it shows.
        header: one text per column.
        rows: texts, as many per row as there are columns.
        align: one letter per column: `l` or `r`.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str

    def __post_init__(self) -> None:
        bad = [row for row in self.rows if len(row) != len(self.header)]
        if len(self.align) != len(self.header) or bad:
            raise ValueError(f"table {self.title!r} has {len(self.header)} columns, align {self.align!r}, rows {bad}")

    def text(self) -> str:
        """Columns padded with spaces, for a terminal."""
        widths = [max(len(r[i]) for r in (self.header, *self.rows)) for i in range(len(self.header))]
        lines = [
            "  ".join(_pad(c, w, a) for c, w, a in zip(r, widths, self.align, strict=True)).rstrip()
            for r in (self.header, *self.rows)
        ]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])

    def markdown(self) -> str:
        """A GitHub-flavoured markdown table."""
        rule = ["---:" if a == "r" else ":---" for a in self.align]
        rows = [[_escape(cell) for cell in row] for row in (self.header, *self.rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def contender_table(record: Record) -> Table:
    """The winner and the baselines, retrained with several seeds: score and the winner's gain over each."""
    metric = search_metric(record)
    rows = []
    for index, c in enumerate(record.contenders):
        mean, seeds = _mean_text(c.outcomes, metric)
        versus = ("", "") if index == 0 else (gain_text(metric, c.gain), _interval(c, metric))
        spent = f"{c.spent:,}" if c.spent else "head only"
        rows.append((c.name + (" (winner)" if index == 0 else ""), c.role, spent, seeds, mean, *versus))
    header = ("plan", "kind", "spent", "seeds", metric, "gain of the winner", "95 % interval")
    return Table("Winner and baselines", header, tuple(rows), "llrrrrr")


def standing_table(record: Record) -> Table:
    """Every contender that was asked for: its variants with their mean and deviation, its own search, or why not."""
    metric, full = search_metric(record), record.costs.get(_FULL, 0.0)
    rows = []
    for name, s in record.standings.items():
        mean, deviation = s.mean, s.deviation
        spread = ""
        if mean is not None and deviation is not None:
            spread = f"{metric_text(metric, mean)} ± {gain_text(metric, deviation).lstrip('+')}"
        own = f"{s.sample_epochs / full:.2f}" if s.sample_epochs and full else ""
        variants = str(len(s.variants)) if s.variants else ""
        rows.append((name, variants, str(s.tries or ""), spread, own, s.reason or s.note))
    header = ("contender", "variants", "learning rates", "variants' mean ± sd", "own search", "remark")
    return Table("Contenders", header, tuple(rows), "lrrrrl")


def trial_table(record: Record) -> Table:
    """Every trial: what it was, what it cost, what came of it. A star marks the one that was taken."""
    metric = search_metric(record)
    decided = record.search.get("chosen_by", metric)
    shown = (metric,) if decided == metric else (metric, decided)
    rows = tuple(
        (
            str(t.number) + ("*" if t.number == record.best else ""),
            t.name,
            t.outcome.status,
            *(metric_text(n, t.outcome.metrics[n]) if n in t.outcome.metrics else "-" for n in shown),
            f"{t.spent:,}",
            mix_text(t),
            f"{t.fidelity:,}",
            stage_seconds(t.outcome.seconds),
        )
        for t in record.trials
    )
    header = ("#", "plan", "status", *shown, "spent", "methods", "sample-epochs", "time")
    return Table("Trials", header, rows, "rll" + "r" * len(shown) + "rlrr")


def allocation_table(rows: Iterable[AllocationRow]) -> Table:
    """Where the parameters of a plan lie, site by site, and what each does to memorisation where that is known."""
    listed = tuple(rows)
    total = sum(row.cost for row in listed)
    remembers = any(r.memory is not None for r in listed)

    def cells(r: AllocationRow) -> tuple[str, ...]:
        own = (r.site, r.slot, r.method, f"{r.size:,}", f"{r.cost:,}", share_text(r.cost, total), f"{r.gain:.3g}")
        return (*own, "" if r.memory is None else f"{r.memory:+.3g}") if remembers else own

    header: tuple[str, ...] = ("site", "slot", "method", "size", "parameters", "share", "predicted gain")
    if remembers:
        header = (*header, "memorisation")
    return Table("Allocation", header, tuple(map(cells, listed)), "lllrrrr" + "r" * remembers)


def spending_tables(rows: Iterable[AllocationRow]) -> tuple[Table, ...]:
    """Where the budget went, by method, by role and by depth, with text bars; no depths when none is known."""
    listed = tuple(rows)
    tables = [_bars("method", spending(listed, lambda r: r.method)), _bars("role", spending(listed, lambda r: r.role))]
    known = [r for r in listed if r.depth is not None]
    if known and len(known) == len(listed):
        by_depth = spending(listed, lambda r: str(r.depth))
        tables.append(_bars("block", dict(sorted(by_depth.items(), key=lambda item: int(item[0])))))
    return tuple(tables)


def cost_table(record: Record) -> Table:
    """What the run cost per stage, in training passes of one sample and in units of one full training.

    What belongs to the search of our plan is one column, what the baselines cost another, and the trainings at the end,
    which are alike for all, stand below their sums.
    """
    full = record.costs.get(_FULL, 0.0)
    ours = {stage: value for stage, value in record.costs.items() if stage not in (_FULL, _OTHERS, _LAST)}

    def row(stage: str, own: float | None, others: float | None, seconds: str = "") -> tuple[str, ...]:
        texts = [f"{v / full:.2f}" if full else "-" for v in (own, others) if v is not None]
        cells = [texts.pop(0) if v is not None else "" for v in (own, others)]
        return (stage, number((own or 0.0) + (others or 0.0)), *cells, seconds)

    rows = [row(stage, value, None, _seconds(record, stage)) for stage, value in ours.items()]
    if _OTHERS in record.costs:
        rows.append(row(_OTHERS, None, record.costs[_OTHERS], _seconds(record, _OTHERS)))
    if len(rows) > 1:
        rows.append(row("search in all", sum(ours.values()), record.costs.get(_OTHERS)))
    if _LAST in record.costs:
        rows.append(row(_LAST, record.costs[_LAST], None, _seconds(record, _LAST)))
    rows += [(stage, "", "", "", stage_seconds(s)) for stage, s in record.seconds.items() if stage not in record.costs]
    if full:
        rows.append(("one full training", number(full), "1.00", "", ""))
    header = ("stage", "passes", "full trainings", "baselines", "wall time")
    return Table("Costs", header, tuple(rows), "lrrrr")


def environment_table(record: Record) -> Table:
    """What the run ran on and with."""
    rows = tuple((str(key), _plain(value)) for key, value in record.environment.items())
    return Table("Environment", ("what", "value"), rows, "ll")


def mix_text(trial: Trial) -> str:
    """Methods of a plan with their share of the parameters, the largest first: `core 80 %, bias 20 %`."""
    total = sum(trial.mix.values())
    ordered = sorted(trial.mix.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{key} {100 * n / total:.0f} %" for key, n in ordered if n) or "head only"


def _bars(by: str, totals: dict[str, int]) -> Table:
    whole, top = sum(totals.values()), max(totals.values(), default=0)
    rows = tuple((key, f"{n:,}", share_text(n, whole), bar(n / top if top else 0.0)) for key, n in totals.items())
    return Table(f"By {by}", (by, "parameters", "share", ""), rows, "lrrl")


def _mean_text(outcomes: Sequence[Outcome], metric: str) -> tuple[str, str]:
    values = [o.metrics[metric] for o in outcomes if metric in o.metrics]
    seeds = str(len(values)) if len(values) == len(outcomes) else f"{len(values)} of {len(outcomes)}"
    if not values:
        return "-", seeds
    mean = sum(values) / len(values)
    if len(values) < 2:
        return metric_text(metric, mean), seeds
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{metric_text(metric, mean)} ± {gain_text(metric, deviation).lstrip('+')}", seeds


def _interval(contender: Contender, metric: str) -> str:
    low, high = contender.interval
    return f"[{gain_text(metric, low)}, {gain_text(metric, high)}]"


def _seconds(record: Record, stage: str) -> str:
    return stage_seconds(record.seconds[stage]) if stage in record.seconds else ""


def _pad(cell: str, width: int, align: str) -> str:
    return cell.rjust(width) if align == "r" else cell.ljust(width)


def _escape(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
