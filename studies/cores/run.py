"""Between which bases, and in which shapes, core matrices turn a small budget into accuracy.

    python studies/cores/run.py --assets ASSETS --output studies/cores [--cells NAME ...]

Every contender packs the budget with the default scores and solver from a menu of its own kind alone; `brain` chooses
among all of them, place by place, by predicted gain. Rates are tuned on the outer split, the same half decades for
each; the best is trained with three new seeds and measured on the test split, which is opened once per cell, after
the last choice. Trainings that the ledger beside the result holds are not repeated, so an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from autopeft.config.study import DataSettings, Study
from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Method
from autopeft.errors import AutopeftError
from autopeft.methods._core_bases import Basis
from autopeft.methods.core import Core
from autopeft.methods.shared_core import SharedCore
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.finish import paired_interval
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import read_json, write_json

SEEDS = (1, 2, 3)
RATES = (0.316, 1.0)
HEAD_ONLY = "head only"
WEIGHT = "weight"


@dataclass(frozen=True)
class Cell:
    """A model on a task, with what it is trained with."""

    model: ModelSpec
    data: str
    inner: int
    epochs: int
    budget: str
    contenders: tuple[str, ...] = ()


def cells(assets: Path) -> dict[str, Cell]:
    """The cells by name; digits and animals on the bundled model were looked at while defaults were chosen."""
    bundled = ModelSpec("bundled:vit_tiny_fashion")
    lite = ModelSpec("tf_efficientnet_lite0", pretrained_path=str(assets / "lite0.safetensors"), img_size=96)
    vit = ModelSpec(
        "vit_small_patch14_dinov2", pretrained_path=str(assets / "vit_small_patch14.safetensors"), img_size=56
    )
    animals, cifar = str(assets / "animals"), str(assets / "cifar10")
    found = {}
    for budget, those in (("0.1%", MIDDLE), ("0.01%", ULTRA_LOW), ("0.5%", ULTRA_LOW)):
        found[f"bundled digits {budget}"] = Cell(bundled, "digits", 256, 3, budget, those)
        found[f"bundled animals {budget}"] = Cell(bundled, animals, 256, 3, budget, those)
        if budget == "0.1%":
            found[f"lite0 cifar10 {budget}"] = Cell(lite, cifar, 200, 3, budget, SMALL)
            found[f"vit-s14 cifar10 {budget}"] = Cell(vit, cifar, 200, 3, budget, SMALL)
    return found


SMALL = (HEAD_ONLY, WEIGHT, "trajectory", "random", "rectangle", "lora")
"""What the larger models compare."""

MIDDLE = (HEAD_ONLY, *get_args(Basis), "rectangle", "diagonal", "brain")
"""What the small model compares at 0.1 %; `contenders` has more, for a longer run."""

ULTRA_LOW = (
    HEAD_ONLY,
    WEIGHT,
    "gradient",
    "activation",
    "trajectory",
    "random",
    "rectangle",
    "diagonal",
    "shared",
    "brain",
)
"""What the budgets beside 0.1 % compare."""


def contenders(study: Study) -> dict[str, Mapping[str, Method]]:
    """Name of a contender to the methods on its menu."""
    squares: dict[str, Method] = {basis: Core(basis) for basis in get_args(Basis)}
    shapes: dict[str, Method] = {
        "rectangle": Core(shape="rectangle"),
        "diagonal": Core(shape="diagonal"),
        "blocks": Core(shape="blocks"),
    }
    alone: dict[str, Method] = {
        **squares,
        **shapes,
        "shared": SharedCore(),
        "shared, scaled": SharedCore(scales=True),
        "lora": study.methods["lora"],
    }
    found: dict[str, Mapping[str, Method]] = {HEAD_ONLY: {}}
    found |= {name: {name.replace(", ", "_"): method} for name, method in alone.items()}
    found["brain"] = {name: method for name, method in (squares | shapes).items() if name != "random"}
    return found


def tuned(runner: Runner, study: Study, plan: Allocation, label: str) -> dict[float, tuple[float, float]]:
    """What every rate gives on the outer split: top-1, and the negative log-likelihood with its sign turned."""
    return {
        scale: runner.rank(at(study, scale), runner.train(at(study, scale), plan, label=f"{label} x{scale:g}").outcome)
        for scale in RATES
    }


def say(event: Event) -> None:
    print(event.text, flush=True)


def at(study: Study, scale: float) -> Study:
    return dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale))


def measured(name: str, cell: Cell, output: Path, until: float) -> dict[str, Any]:
    """Every contender of a cell; after `until` no contender's finish is begun, and those without one have no mean."""
    base = Study()
    study = dataclasses.replace(
        base,
        model=cell.model,
        budget=cell.budget,
        data=DataSettings(cell.data, max_inner=cell.inner, batch_size=16),
        train=dataclasses.replace(base.train, epochs=cell.epochs, threads=1),
    )
    folder = output / "ledger" / name.replace(" ", "_")
    prepared = prepare(study, folder, {"unseal_token": "cores"})
    runner = Runner(prepared, Ledger(folder), say)
    chosen: dict[str, tuple[Study, Allocation]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for contender, methods in contenders(study).items():
        if cell.contenders and contender not in cell.contenders:
            continue
        one = dataclasses.replace(study, methods=methods or study.methods)
        label = f"{name} {contender}"
        start = time.perf_counter()
        try:
            plan = make_plan(prepared, one) if methods else Allocation((), prepared.budget)
        except AutopeftError as error:
            rows[contender] = {"left out": str(error)}
            print(f"{label}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        tried = tuned(runner, one, plan, label) if methods else {}
        best = max(tried, key=lambda scale: tried[scale], default=1.0)
        chosen[contender] = (at(one, best), plan)
        taken: dict[str, int] = {}
        for option in plan:
            taken[option.method] = taken.get(option.method, 0) + 1
        rows[contender] = {
            "trained": plan.trainable,
            "stored": plan.cost.stored,
            "options": taken,
            "gain": plan.gain,
            "plan_seconds": round(seconds, 2),
            "lr_scale": best,
            "outer": {str(scale): [round(v, 4) for v in values] for scale, values in tried.items()},
        }
    prepared.task.unseal_test()
    correct: dict[str, list[Any]] = {}
    for contender, (one, plan) in chosen.items():
        keys = [runner.key(one, plan, s, ("inner",), "test", cell.epochs) for s in SEEDS]
        if time.monotonic() > until and any(runner.ledger.get(key) is None for key in keys):
            continue
        entries = [runner.train(one, plan, label=f"{name} {contender}", seed=s, measure="test") for s in SEEDS]
        values = [entry.outcome.metrics["top1"] for entry in entries]
        rows[contender] |= {"test_top1": [round(v, 4) for v in values], "mean": round(statistics.fmean(values), 4)}
        correct[contender] = [entry.merits for entry in entries]
    for contender, mine in correct.items():
        for other in {WEIGHT, HEAD_ONLY} - {contender}:
            if other not in correct:
                continue
            theirs = correct[other]
            ends = paired_interval(mine, theirs)
            rows[contender][f"over {other}"] = [round(float(v), 4) for v in (np.mean(mine) - np.mean(theirs), *ends)]
    return {
        "model": cell.model.spec,
        "epochs": cell.epochs,
        "limit": prepared.budget.limit,
        "sizes": dict(prepared.task.sizes),
        "basis_samples": prepared.basis_samples,
        "seconds": {key: round(value, 2) for key, value in prepared.seconds.items()},
        "environment": environment_facts(prepared),
        "contenders": rows,
    }


def table(result: Mapping[str, Any]) -> str:
    """One table per cell, best first."""
    lines: list[str] = []
    for name, cell in result.items():
        rows = cell["contenders"]
        lines += [f"## {name} ({cell['limit']:,} parameters)", ""]
        columns = ("contender", "test top-1 (3 seeds)", "over `weight`, 95 %", "over the probe, 95 %", "trained")
        lines += [f"| {' | '.join(columns)} | stored | lr x |", "|---" * 7 + "|"]
        for contender in sorted((c for c in rows if "mean" in rows[c]), key=lambda c: -rows[c]["mean"]):
            row = rows[contender]
            over = [
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(v * 100 for v in row[key])) if key in row else ""
                for key in (f"over {WEIGHT}", f"over {HEAD_ONLY}")
            ]
            shown = f"{row['mean'] * 100:.1f} ({', '.join(f'{v * 100:.1f}' for v in row['test_top1'])})"
            cells_ = (contender, shown, *over, f"{row['trained']:,}", f"{row['stored']:,}", f"{row['lr_scale']:g}")
            lines.append(f"| {' | '.join(cells_)} |")
        lines += [f"| {c} | left out: {row['left out']} | | | | | |" for c, row in rows.items() if "left out" in row]
        tuned_only = [
            f"{c} {max(v[0] for v in row['outer'].values()) * 100:.1f}" for c, row in rows.items() if row.get("outer")
        ]
        lines += ["", f"Outer split at the better rate: {', '.join(tuned_only)}."]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cells", nargs="*")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these, no contender's finish is begun")
    args = parser.parse_args()
    known = cells(args.assets)
    for name in args.cells or known:
        found = measured(name, known[name], args.output, time.monotonic() + args.seconds)
        path = args.output / "result.json"
        result = {**(read_json(path) if path.is_file() else {}), name: found}
        result = {key: result[key] for key in known if key in result}
        write_json(path, result)
        (args.output / "table.md").write_text(table(result))


if __name__ == "__main__":
    main()
