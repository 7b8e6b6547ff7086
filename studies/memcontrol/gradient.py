"""Plans packed at a price per unit of memorisation, beside the masks that a black box has found.

    python studies/memcontrol/run.py
    python studies/memcontrol/gradient.py

The second one trains, under the budget that the found mask (its knee) takes, one plan per price: SV-DIFF's shifts,
chosen site by site by exact packing, for the predicted decrease of the loss less the price of the predicted change of
the planted images' squared noise difference. Both predictions come from one scoring of the model before training, but
for its table of labels, which is trained alone first: new classes start as no class, where nothing differs. The rate
is tuned on the plan without a price and serves all, so that there are three trainings on inner, and one per further
price; the mask search had as many as `run.py` gave it, whose epochs are taken over. Two plans are chosen as the masks
were: the knee of (loss, noise difference) on the outer split, and the best loss that remembers no more than unmasked
SV-DIFF. They and the plan without a price are trained with three new seeds, as the masks were, and measured on the test
split. Reported besides: how the predicted change ranks plans against the noise difference that was measured, how much
of either front on the outer split the other one covers, and the costs. Trainings are kept in a ledger.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from run import COLUMNS, HERE, MEMORY, QUALITY, SEEDS, say, study_of, tested, tuned
from scipy.stats import spearmanr
from torch import nn

from autopeft.allocation.gain import GainPolicy
from autopeft.allocation.knapsack import Knapsack
from autopeft.config.study import Study
from autopeft.core.allocation import Allocation
from autopeft.core.goals import Goals
from autopeft.pipeline.costs import fixed_costs
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.runner import Runner
from autopeft.scoring.calibrated import Calibrated
from autopeft.scoring.gradient import Gradient
from autopeft.store.atomic import read_json, write_json

PRICES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
FREE = "price 0"
FOUND = "found, knee"
SAME = 1e-9
"""Next to nothing: a plan of this price is the one without any, with its predicted change shown."""

Point = tuple[float, float]


def priced_study(epochs: int, trials: int, parameters: int) -> Study:
    """The study of the masks with packing in the place of the mask, under so many parameters."""
    return dataclasses.replace(
        study_of(epochs, trials),
        budget=str(parameters),
        allocator=Knapsack(),
        scorer=Calibrated(Gradient(batch_size=4, blocks=False), folds=0, memory="noise_difference"),
    )


def priced(study: Study, price: float) -> Study:
    return dataclasses.replace(study, gain=GainPolicy(price=price or SAME))


@contextmanager
def labels_learned(prepared: Prepared, study: Study) -> Iterator[None]:
    """Scores measured inside see a table of labels that was trained alone; the model is given back as it was."""
    model, task = prepared.model, prepared.task
    tables = [p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]
    flags, before = [p.requires_grad for p in model.parameters()], [p.detach().clone() for p in tables]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is table for table in tables))
    optimizer = torch.optim.AdamW(tables, lr=study.train.lr.head, weight_decay=0.0)
    for epoch in range(study.train.epochs):
        for batch in task.batches("inner", epoch):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    try:
        _ = prepared.scores
        yield
    finally:
        with torch.no_grad():
            for table, value in zip(tables, before, strict=True):
                table.copy_(value)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one dominates, both numbers minimised."""
    return [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]


def coverage(one: Sequence[Point], other: Sequence[Point]) -> float:
    """Share of the other's points that some point of one is at least as good as in both numbers.

    Zitzler and Thiele, 1999, definition of C.
    """
    return sum(any(p[0] <= q[0] and p[1] <= q[1] for p in one) for q in other) / len(other)


def chosen(outer: Mapping[str, Point], most: float) -> dict[str, str]:
    """Which plan is the knee, and which is the best that remembers at most so much."""
    names, points = list(outer), [tuple(point) for point in outer.values()]
    directions = ("minimize", "minimize")
    knee = Goals((QUALITY, MEMORY), directions, "pareto").choose(points)
    epsilon = Goals((QUALITY, MEMORY), directions, "epsilon", {MEMORY: most}).choose(points)
    return {"priced, knee": names[knee], "priced, epsilon": names[epsilon]}


def trained(runner: Runner, study: Study, prices: Sequence[float]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """A row per price with what was predicted and what was measured on the outer split, and the plans with studies."""
    prepared = runner.prepared
    free = make_plan(prepared, priced(study, 0.0))
    best, facts = tuned(runner, study, free, FREE)
    rows: dict[str, dict[str, Any]] = {}
    plans: dict[str, tuple[Study, Allocation]] = {}
    for price in prices:
        name, plan = f"price {price:g}", make_plan(prepared, priced(study, price))
        outcome = runner.train(best, plan, label=name, seed=0, stage="search").outcome
        if outcome.status != "done":
            raise SystemExit(f"{name}: {outcome.reason}")
        plans[name] = best, plan
        assert plan.memory is not None
        rows[name] = {
            "price": price,
            "parameters": plan.trainable,
            "options": len(plan),
            "digest": plan.digest,
            "predicted_gain": plan.gain + (price or SAME) * plan.memory,
            "predicted_memory": plan.memory,
            "outer": [round(value, 4) for value in best.reward.value(outcome)],
        }
    rows[FREE] |= facts
    return rows, plans


def finals(prepared: Prepared, runner: Runner, picked: Mapping[str, tuple[Study, Allocation]]) -> dict[str, Any]:
    """Three seeds, measured on the test split, which is opened here."""
    prepared.task.unseal_test()
    return {
        name: {"parameters": plan.trainable} | tested(runner, one, [plan] * len(SEEDS), name)
        for name, (one, plan) in picked.items()
    }


def measured(args: argparse.Namespace) -> dict[str, Any]:
    masks = read_json(args.result)
    settings, parameters = masks["settings"], masks["contenders"][FOUND]["parameters"]
    study = priced_study(settings["epochs"], settings["trials"], parameters)
    if study.data.spec != settings["data"]:
        raise SystemExit(
            f"{args.result} is of data {settings['data']}, run.py now takes {study.data.spec}: run it again"
        )
    ledger = args.output / "ledger" / "gradient"
    prepared = prepare(study, ledger / "run", {"unseal_token": "memcontrol-gradient"})
    if dict(prepared.task.sizes) != masks["sizes"]:
        raise SystemExit(
            f"{args.result} has {masks['sizes']} samples, here are {dict(prepared.task.sizes)}: run it again"
        )
    with labels_learned(prepared, study):
        costs = fixed_costs(prepared) | {"labels": prepared.task.sizes["inner"] * study.train.epochs}
    runner = Runner(prepared, Ledger(ledger), say)
    rows, plans = trained(runner, study, args.prices)
    costs |= runner.ledger.passes()
    costs.pop("finish", None)
    outer = {name: tuple(row["outer"]) for name, row in rows.items()}
    picked = {FREE: FREE, **chosen(outer, masks["limit"])}
    distinct = {rows[name]["digest"] for name in picked.values()}
    ours, theirs = (front(points) for points in ([*outer.values()], [tuple(t["rewards"]) for t in masks["search"]]))
    remembered = [[r["predicted_memory"] for r in rows.values()], [r["outer"][1] for r in rows.values()]]
    alike = any(len(set(values)) == 1 for values in remembered)
    return {
        "settings": {**settings, "prices": args.prices, "parameters": parameters},
        "environment": environment_facts(prepared),
        "prices": rows,
        "picked": picked,
        "distinct_plans": len(distinct),
        "rank_correlation": None if alike else round(float(spearmanr(*remembered).statistic), 3),
        "fronts": {"priced": ours, "masks": theirs},
        "coverage": {"priced of masks": coverage(ours, theirs), "masks of priced": coverage(theirs, ours)},
        "costs": {stage: round(passes) for stage, passes in costs.items()},
        "mask_costs": masks["costs"],
        "full_training": masks["full_training"],
        "contenders": finals(prepared, runner, {name: plans[plan] for name, plan in picked.items()}),
        "masks": {name: row for name, row in masks["contenders"].items() if set(COLUMNS) <= set(row)},
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown: the prices, the finals beside those of the masks, and what each search has cost."""
    heads = ("price", "parameters", "predicted gain", "predicted change of memorisation", QUALITY, MEMORY)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in result["prices"].values():
        numbers = (row["predicted_gain"], row["predicted_memory"], *row["outer"])
        cells = [f"{row['price']:g}", f"{row['parameters']:,}", *(f"{value:.4g}" for value in numbers)]
        lines.append("| " + " | ".join(cells) + " |")
    shares, rank = result["coverage"], result["rank_correlation"]
    lines += [
        "",
        f"Predicted change and measured noise difference: rank correlation {'-' if rank is None else rank}. On the "
        f"outer split the prices' front is at least as good as {shares['priced of masks']:.0%} of the masks', theirs "
        f"as {shares['masks of priced']:.0%} of the prices'.",
        "",
        "Test split, mean and range of the seeds:",
        "",
        "| contender | parameters | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for name, row in {**result["contenders"], **result["masks"]}.items():
        plan = f" ({result['picked'][name]})" if name in result["picked"] and name != FREE else ""
        cells = [f"{statistics.fmean(v):.3g} ({min(v):.3g} to {max(v):.3g})" for v in (row[c] for c in COLUMNS)]
        lines.append(f"| {name}{plan} | {row['parameters']:,} | " + " | ".join(cells) + " |")
    own = sum(result["costs"].values()) / result["full_training"]
    masks = result["mask_costs"].get("search", 0) / result["full_training"]
    lines += [
        "",
        f"Cost in full trainings (passes over samples): prices, with scoring and rates, {own:.1f}; masks {masks:.1f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prices", type=float, nargs="+", default=PRICES, help="0 must be among them")
    parser.add_argument("--result", type=Path, default=HERE / "result.json", help="what run.py has written")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    if 0 not in args.prices:
        parser.error("--prices must hold 0, the plan that the others are compared with")
    result = measured(args)
    write_json(args.output / "gradient.json", result)
    (args.output / "gradient.md").write_text(table(result))


if __name__ == "__main__":
    main()
