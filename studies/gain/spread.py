"""Does it pay to pack for less and less gain in one block? The knapsack's `curve`, side by side.

    python studies/gain/spread.py --assets ASSETS --output studies/gain

On the bundled model and three tasks the default plan of 0.1 % is packed for the sum over blocks of (the block's
gain)^curve; at 1 that is the plain sum. Each plan is trained at three learning rates with seed 0, and at the rate of
lowest negative log-likelihood on the outer split with the other seeds. Differences to the plain sum are paired by seed
and by picture (shards of the outer split); the interval resamples both. The test split stays sealed. Writes
`spread.json` and `spread.md`; the ledger resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cell

from autopeft.allocation.knapsack import Knapsack
from autopeft.config.study import Study
from autopeft.core.allocation import Allocation
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Entry, Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import read_json, write_json, write_text

CURVES = (1.0, 0.8, 0.6, 0.4)
SEEDS = (0, 1, 2, 3, 4)
CELLS = tuple(Cell("bundled", data, 400, 4, (0.316, 1.0, 3.16)) for data in ("digits", "animals", "cifar10"))
DRAWS = 2000


def say(event: Event) -> None:
    print(event.text, flush=True)


def at(study: Study, scale: float) -> Study:
    return dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale))


def trained(runner: Runner, study: Study, plan: Allocation, cell: Cell, label: str) -> dict[str, Any]:
    """One training per seed at the rate that is best with the first; mean losses of the shards of the outer split."""

    def run(scale: float, seed: int) -> Entry:
        return runner.train(at(study, scale), plan, label=f"{label} x{scale:.3g}, seed {seed}", seed=seed)

    first = {scale: run(scale, SEEDS[0]) for scale in cell.scales}
    done = {scale: e.outcome.metrics["nll"] for scale, e in first.items() if e.outcome.status == "done"}
    best = min(done, key=lambda scale: done[scale])
    entries = [first[best], *(run(best, seed) for seed in SEEDS[1:])]
    depths: dict[str, int] = {}
    for option in plan:
        site = option.site.split(".")
        block = ".".join(site[:2]) if site[0] == "blocks" else "outside"
        depths[block] = depths.get(block, 0) + option.cost.trainable
    return {
        "spent": plan.spent,
        "by_block": depths,
        "lr_scale": best,
        "nll": [e.outcome.metrics["nll"] for e in entries],
        "top1": [e.outcome.metrics["top1"] for e in entries],
        "shards": [list(e.shards) for e in entries],
    }


def difference(row: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[float, float, float]:
    """Mean loss below that of the plain sum, and its 95 % interval over seeds and shards."""
    gap = np.array(plain["shards"]) - np.array(row["shards"])
    rng = np.random.default_rng(0)
    n, m = gap.shape
    means = [gap[rng.integers(n, size=n)][:, rng.integers(m, size=m)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(gap.mean()), float(low), float(high)


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "Negative log-likelihood and accuracy on the outer split, mean of five seeds; in brackets by how much the loss",
        "is below that of the plain sum, 95 %.",
        "",
        f"| cell | {' | '.join(f'curve {c:g}' for c in CURVES)} |",
        "|" + "---|" * (len(CURVES) + 1),
    ]
    for name, rows in result.items():
        texts = []
        for curve in CURVES:
            row = rows["curves"][f"{curve:g}"]
            text = f"{np.mean(row['nll']):.4f}, {100 * np.mean(row['top1']):.1f} %"
            if curve != 1:
                _, low, high = difference(row, rows["curves"]["1"])
                text += f" [{low:+.4f}, {high:+.4f}]"
            texts.append(text)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    path = args.output / "spread.json"
    result = read_json(path) if path.exists() else {}
    for cell in CELLS:
        study = cell.study(args.assets)
        prepared = prepare(study, args.output / "ledger" / cell.name.replace(" ", "_"))
        runner = Runner(prepared, Ledger(args.output / "ledger"), say)
        rows = {}
        for curve in CURVES:
            plan = make_plan(prepared, dataclasses.replace(study, allocator=Knapsack(curve=curve)))
            rows[f"{curve:g}"] = trained(runner, study, plan, cell, f"{cell.name}, curve {curve:g}")
        result[cell.name] = {"curves": rows, "environment": environment_facts(prepared)}
        write_json(path, result)
        write_text(args.output / "spread.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
