"""One cell of the budget frontier after another; `protocol.md` says what is done and why.

    python studies/budget_frontier/run.py --assets ASSETS                          # the core grid
    python studies/budget_frontier/run.py --assets ASSETS --models bundled --budgets 0.1%
    python studies/budget_frontier/run.py --assets ASSETS --device cuda --models vit-s14 lite0

ASSETS holds the files that `studies/assets/convert.py` makes. A finished cell is `cells/MODEL_DATA_BUDGET.json` and is
not run again; trainings of an unfinished one are kept in the ledger. `tables.py` reads the cells.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.config.study import DataSettings, Study
from autopeft.core.allocation import Allocation
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.contenders import Candidate, Group, contender
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Entry, Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import write_json

STEP = 10**0.5
SCALES = tuple(STEP**i for i in range(-2, 3))
SCREENED = SCALES[2:4]
SEEDS = (1, 2, 3)
EXTENSIONS = 2
MODELS: Mapping[str, tuple[str, str | None, int | None]] = {
    "bundled": ("bundled:vit_tiny_fashion", None, None),
    "vit-s14": ("vit_small_patch14_dinov2", "vit_small_patch14.safetensors", 42),
    "lite0": ("tf_efficientnet_lite0", "lite0.safetensors", 96),
}
EPOCHS = {"bundled": 12, "vit-s14": 6, "lite0": 6}
DATA = ("digits", "animals", "cifar10")
BUDGETS = ("0.1%", "0.5%")
CONTENDERS = ("head_only", "full", "uniform_lora", "uniform_core", "single_method", "spt_lora", "random_mix")


@dataclass(frozen=True)
class Cell:
    """A model, a task and a budget."""

    model: str
    data: str
    budget: str

    @property
    def name(self) -> str:
        return f"{self.model}_{self.data}_{self.budget}"

    def study(self, assets: Path, device: str) -> Study:
        spec, file, size = MODELS[self.model]
        data = self.data if self.data == "digits" else str(assets / self.data)
        base = Study()
        return dataclasses.replace(
            base,
            model=ModelSpec(spec, pretrained_path=str(assets / file) if file else None, img_size=size),
            data=DataSettings(data, max_samples=1000, val_frac=0.2, test_frac=0.2),
            budget=self.budget,
            train=dataclasses.replace(base.train, epochs=EPOCHS[self.model], threads=1),
            device=device,
        )


@dataclass(frozen=True)
class Chosen:
    """A contender's variant and rate, and what choosing them has cost."""

    candidate: Candidate
    study: Study
    scale: float
    outer_nll: float
    tried: Mapping[str, Mapping[str, float]]
    samples: int


def say(event: Event) -> None:
    print(event.text, flush=True)


def at(study: Study, scale: float, epochs: int) -> Study:
    return dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale, epochs=epochs))


def choose(runner: Runner, study: Study, group: Group) -> Chosen:
    """The variant and rate of lowest negative log-likelihood on the outer split after a third of the epochs."""
    short = max(1, study.train.epochs // 3)
    found: dict[str, dict[float, float]] = {candidate.name: {} for candidate in group.candidates}
    samples = 0

    def attempt(candidate: Candidate, scale: float) -> float:
        nonlocal samples
        if scale not in found[candidate.name]:
            label = f"{candidate.name}, learning rate x{scale:.3g}"
            entry = runner.train(at(candidate.under(study), scale, short), candidate.allocation, label=label)
            samples += entry.sample_epochs
            done = entry.outcome.status == "done"
            found[candidate.name][scale] = entry.outcome.metrics["nll"] if done else float("inf")
        return found[candidate.name][scale]

    chosen = group.candidates[0]
    if len(group.candidates) > 1:
        chosen = min(group.candidates, key=lambda candidate: min(attempt(candidate, scale) for scale in SCREENED))
    # The head's rate is the same everywhere, so that a plan of nothing has none to tune.
    for scale in (1.0,) if group.name == "head only" else SCALES:
        attempt(chosen, scale)
    rates = found[chosen.name]
    for _ in range(EXTENSIONS if len(rates) > 1 else 0):
        least = min(rates, key=lambda s: rates[s])
        if least not in (min(rates), max(rates)):
            break
        attempt(chosen, least / STEP if least == min(rates) else least * STEP)
    scale = min(rates, key=lambda s: rates[s])
    tried = {name: {f"{s:.3g}": round(v, 5) for s, v in sorted(of.items())} for name, of in found.items()}
    return Chosen(chosen, chosen.under(study), scale, rates[scale], tried, samples)


def packed(correct: np.ndarray) -> str:
    return np.packbits(correct).tobytes().hex()


def run(cell: Cell, assets: Path, output: Path, device: str) -> dict[str, Any]:
    begun = time.perf_counter()
    study = cell.study(assets, device)
    folder = output / "ledger" / cell.name
    prepared = prepare(study, folder, {"unseal_token": cell.name})
    runner = Runner(prepared, Ledger(output / "ledger"), say)
    groups = [contender(name, prepared, study) for name in CONTENDERS]
    default = Group("default plan", "default", (Candidate("default plan", make_plan(prepared, study)),))
    missing = {group.name: group.reason for group in groups if not group.candidates}
    wanted = [group for group in (*groups, default) if group.candidates]
    chosen = {group.name: choose(runner, study, group) for group in wanted}
    prepared.task.unseal_test()
    full = study.train.epochs * prepared.task.sizes["inner"]
    rows = {}
    for name, choice in chosen.items():
        entries: list[Entry] = [
            runner.train(
                at(choice.study, choice.scale, study.train.epochs),
                choice.candidate.allocation,
                label=f"test {name}, seed {seed}",
                seed=seed,
                splits=("inner", "outer"),
                measure="test",
            )
            for seed in SEEDS
        ]
        own = prepared.scores.origin.n_samples if name in ("default plan", "spt-lora") else 0
        rows[name] = {
            "variant": choice.candidate.name,
            "lr_scale": choice.scale,
            "spent": choice.candidate.allocation.spent,
            "options": len(choice.candidate.allocation),
            "mix": mix(choice.candidate.allocation),
            "outer_nll": choice.outer_nll,
            "tried": choice.tried,
            "cost": round((choice.samples + own) / full, 3),
            "test_top1": [e.outcome.metrics.get("top1", 0.0) for e in entries],
            "test_nll": [e.outcome.metrics.get("nll", 0.0) for e in entries],
            "status": [e.outcome.status for e in entries],
            "correct": [packed(e.merits) for e in entries],
        }
    return {
        "cell": dataclasses.asdict(cell),
        "sizes": dict(prepared.task.sizes),
        "limit": prepared.budget.limit,
        "over_budget": sum(row["spent"] > prepared.budget.limit for n, row in rows.items() if n != "full fine-tuning"),
        "base": prepared.catalog.n_base,
        "missing": missing,
        "seeds": SEEDS,
        "contenders": rows,
        "environment": environment_facts(prepared),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def mix(plan: Allocation) -> dict[str, int]:
    found: dict[str, int] = {}
    for option in plan:
        found[option.method] = found.get(option.method, 0) + option.cost.trainable
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--models", nargs="+", default=["bundled", "vit-s14"], choices=sorted(MODELS))
    parser.add_argument("--data", nargs="+", default=list(DATA))
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for model in args.models:
        for budget in args.budgets:
            for data in args.data:
                cell = Cell(model, data, budget)
                path = args.output / "cells" / f"{cell.name}.json"
                if path.exists():
                    print(f"{cell.name}: known", flush=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, run(cell, args.assets, args.output, args.device))


if __name__ == "__main__":
    main()
