"""Where the default plan stands among random plans of the same budget.

    python studies/gain/plans.py --assets ASSETS --output studies/gain

In every cell 32 random feasible mixes of the default menu and the packed plan of every scorer named (the study's own by
default) are trained at the same learning rates, with the seed, the order and the head in common, and compared by the
negative log-likelihood on the outer split at the best rate of each; so are plans packed by the constants, and by the
tilt over depth alone, that `fit.py` fits to the other tasks. The percentile is the share of random plans that are
worse, ties counted half. The test split stays sealed. Writes `plans.json`; the ledger resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, Cell
from fit import fitted_to, is_measured, read

from autopeft.allocation.gain import GainPolicy
from autopeft.allocation.indices import attach_indices
from autopeft.allocation.random import RandomMix
from autopeft.config.registries import SCORERS
from autopeft.config.study import Study
from autopeft.core.allocation import Allocation
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.plan import make_menu, make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import read_json, write_json

PLANS = 32


def say(event: Event) -> None:
    print(event.text, flush=True)


def tried(runner: Runner, study: Study, plan: Allocation, scales: Sequence[float], label: str) -> dict[str, Any]:
    """Outer negative log-likelihood and accuracy at the best of the rates."""
    found = {}
    for scale in scales:
        one = dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale))
        outcome = runner.train(one, plan, label=f"{label} x{scale:g}").outcome
        if outcome.status == "done":
            found[scale] = outcome.metrics
    best = min(found, key=lambda scale: found[scale]["nll"])
    return {"spent": plan.spent, "lr_scale": best, "nll": found[best]["nll"], "top1": found[best]["top1"]}


def percentile(value: float, others: Sequence[float]) -> float:
    """Share of `others` that are larger than `value`, ties counted half."""
    array = np.asarray(others)
    return float(np.mean((array > value) + 0.5 * (array == value)))


def measured(
    cell: Cell, assets: Path, output: Path, scorers: Sequence[str], fitted: GainPolicy | None
) -> dict[str, Any]:
    study = cell.study(assets)
    folder = output / "ledger" / cell.name.replace(" ", "_")
    prepared = prepare(study, folder)
    runner = Runner(prepared, Ledger(output / "ledger"), say)
    menu = make_menu(prepared, study)
    random = []
    for draw in range(PLANS):
        plan = RandomMix().allocate(menu, prepared.budget, draw)
        plan = attach_indices(plan, study.methods, prepared.scores, menu.sites)
        random.append(tried(runner, study, plan, cell.scales, f"{cell.name}: random {draw}"))
    found: dict[str, Any] = {
        "random": random,
        "head": tried(runner, study, Allocation((), prepared.budget), (1.0,), "head"),
    }
    worse = [row["nll"] for row in random]
    for name in scorers:
        own = dataclasses.replace(study, scorer=SCORERS[name]()) if name != "default" else study
        scored = prepare(own)
        row = tried(runner, own, make_plan(scored, own), cell.scales, f"{cell.name}: packed by {name}")
        found[name] = {**row, "percentile": percentile(row["nll"], worse)}
        print(cell.name, name, found[name], flush=True)
    if fitted is not None:
        tilted = dataclasses.replace(study.gain, depth_tilt=fitted.depth_tilt)
        for name, policy in {"constants fitted to other tasks": fitted, "tilt fitted to other tasks": tilted}.items():
            own = dataclasses.replace(study, gain=policy)
            row = tried(runner, own, make_plan(prepared, own), cell.scales, f"{cell.name}: {name}")
            found[name] = {**row, "percentile": percentile(row["nll"], worse), "depth_tilt": policy.depth_tilt}
            print(cell.name, name, found[name], flush=True)
    return {**found, "environment": environment_facts(prepared)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--scorers", nargs="*", default=["default"])
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS])
    args = parser.parse_args()
    path = args.output / "plans.json"
    result = read_json(path) if path.exists() else {}
    every = [read(cell, args.assets, args.output) for cell in CELLS if is_measured(cell, args.output)]
    for cell in CELLS:
        if cell.name in args.cells:
            others = [options for options in every if options.cell.data != cell.data]
            fitted = fitted_to(others, True) if others else None
            result[cell.name] = measured(cell, args.assets, args.output, args.scorers, fitted)
            write_json(path, result)


if __name__ == "__main__":
    main()
