"""Every method alone at one budget on the bundled task: one table.

    python studies/methods/run.py --output studies/methods

Each method packs the budget with the default scores and solver (or buys its cheapest option, where the budget does not
reach that far), tries the same learning rates once on the outer split, and is trained at its best with three seeds. The
test split is opened once, after the last choice. Seconds per step are taken side by side with a LoRA of the same size.
Trainings that the ledger beside the result holds are not repeated, so an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autopeft.backends.hf_peft import HfPeftBackend
from autopeft.config.registries import METHODS
from autopeft.config.study import DEFAULT_METHODS, Study
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Inserted, Method
from autopeft.errors import AutopeftError, InfeasibleBudget
from autopeft.methods.hf_peft import HfPeft
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.finish import paired_interval
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import read_json, write_json

SCALES = (0.1, 0.316, 1.0, 3.16)
SEEDS = (1, 2, 3)
HEAD_ONLY = "head only"
TUNERS = ("adalora", "eva", "fourierft", "loha", "lokr", "lora_ga", "oft", "pissa", "vera")


def say(event: Event) -> None:
    print(event.text, flush=True)


def contenders(study: Study) -> Iterator[tuple[str, Study]]:
    """Every registered method at its defaults, then tuners of PEFT."""
    named: dict[str, Method] = {}
    for name in METHODS:
        if name in ("peft", "sparse"):
            continue
        named[name] = METHODS[name]()
    named |= {key: study.methods[key] for key in DEFAULT_METHODS if key.startswith("sparse")}
    for name, method in sorted(named.items()):
        yield name, dataclasses.replace(study, methods={name: method})
    for tuner in TUNERS:
        name = f"peft:{tuner}"
        methods = {name.replace(":", "_"): HfPeft(tuner)}
        yield name, dataclasses.replace(study, methods=methods, backend=HfPeftBackend())


def plan_of(prepared: Prepared, study: Study) -> tuple[Allocation, bool]:
    """The packed budget, or the cheapest option when nothing fits; and whether it fitted."""
    try:
        plan = make_plan(prepared, study)
        if len(plan):
            return plan, True
    except InfeasibleBudget as error:
        if error.cheapest is None:
            raise
        larger = dataclasses.replace(prepared, budget=Budget(error.cheapest), _energies={})
        return make_plan(larger, study), False
    raise InfeasibleBudget("no option has a positive gain")


def seconds_per_step(
    prepared: Prepared, study: Study, plan: Allocation, other: Study, beside: Allocation
) -> tuple[float, float]:
    """Median seconds of a training step, of the plan and of `beside`, the steps of the two taken in turn."""
    batch = next(iter(prepared.task.batches("inner", 0)))
    times: dict[str, list[float]] = {"this": [], "other": []}

    def step(inserted: Inserted) -> None:
        parameters = [p for group in inserted.groups().values() for p in group]
        for p in parameters:
            p.grad = None
        loss = prepared.task.loss(inserted.model, batch)
        penalty = inserted.penalty()
        torch.autograd.backward(loss if penalty is None else loss + penalty)
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-1e-6)

    for _ in range(5):
        for name, one, allocation in (("this", study, plan), ("other", other, beside)):
            with one.backend.insert(
                prepared.model, prepared.catalog, allocation, one.methods, head=prepared.head
            ) as inserted:
                inserted.train_mode()
                step(inserted)
                for _ in range(3):
                    begun = time.perf_counter()
                    step(inserted)
                    times[name].append(time.perf_counter() - begun)
    return statistics.median(times["this"]), statistics.median(times["other"])


def tuned(runner: Runner, study: Study, plan: Allocation, name: str) -> tuple[float, Mapping[str, float]]:
    """The learning-rate scale of the best outer split, and what every scale gave."""
    tried: dict[float, tuple[float, float]] = {}
    for scale in SCALES:
        one = dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale))
        tried[scale] = runner.rank(one, runner.train(one, plan, label=f"{name} x{scale}").outcome)
    best = max(tried, key=lambda scale: tried[scale])
    return best, {str(scale): round(score[0], 4) for scale, score in tried.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--budget", default="0.5%")
    parser.add_argument("--only", nargs="*", help="names of contenders, for a look; nothing is written")
    args = parser.parse_args()
    study = dataclasses.replace(Study(), budget=args.budget, mergeable=False)
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, epochs=args.epochs))
    prepared = prepare(study, args.output / "ledger" / "run", {"unseal_token": "methods"})
    runner = Runner(prepared, Ledger(args.output / "ledger"), say)

    lora = dataclasses.replace(study, methods={"lora": study.methods["lora"]})
    beside = make_plan(prepared, lora)
    chosen: dict[str, tuple[Study, Allocation]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, one in contenders(study):
        if args.only and name not in args.only:
            continue
        try:
            plan, fits = plan_of(prepared, one)
            # Rates differ by family; a head at another rate would confound them, so only the adapters' are scaled.
            scale, by_scale = tuned(runner, one, plan, name)
            seconds, lora_seconds = seconds_per_step(prepared, one, plan, lora, beside)
        except AutopeftError as error:
            print(f"{name}: {error}", flush=True)
            rows[name] = {"left out": str(error)}
            continue
        chosen[name] = (dataclasses.replace(one, train=dataclasses.replace(one.train, lr_scale=scale)), plan)
        with one.backend.insert(prepared.model, prepared.catalog, plan, one.methods, head=prepared.head) as inserted:
            merges = not any(getattr(part, "obstacle", "") for part in inserted.named_adapters().values())
        rows[name] = {
            "fits": fits,
            "options": len(plan),
            "trained": plan.trainable,
            "stored": sum(o.cost.stored for o in plan),
            "bytes": sum(-(-o.cost.bits // 8) for o in plan),
            "merges": merges,
            "lr_scale": scale,
            "outer_by_scale": by_scale,
            "seconds_per_step": round(seconds, 4),
            "step_time_over_lora": round(seconds / lora_seconds, 3),
        }
    chosen[HEAD_ONLY] = (study, Allocation((), prepared.budget))
    rows[HEAD_ONLY] = {"trained": 0, "stored": 0, "bytes": 0, "lr_scale": 1.0}
    if args.only:
        print(rows)
        return

    prepared.task.unseal_test()
    correct = {
        name: [
            runner.train(one, plan, label=name, seed=seed, splits=("inner", "outer"), measure="test") for seed in SEEDS
        ]
        for name, (one, plan) in chosen.items()
    }
    for name, entries in correct.items():
        values = [entry.outcome.metrics["top1"] for entry in entries]
        rows[name]["test_top1"] = [round(value, 4) for value in values]
        rows[name]["mean"] = round(statistics.fmean(values), 4)
        if name != HEAD_ONLY:
            mine, theirs = ([entry.merits for entry in correct[n]] for n in (name, HEAD_ONLY))
            gain = float(np.mean(mine) - np.mean(theirs))
            low, high = paired_interval(mine, theirs)
            rows[name]["over_head_only"] = [round(gain, 4), round(low, 4), round(high, 4)]
    write_json(
        args.output / "result.json",
        {
            "settings": {"epochs": args.epochs, "budget": args.budget, "limit": prepared.budget.limit, "seeds": SEEDS},
            "sizes": dict(prepared.task.sizes),
            "environment": environment_facts(prepared),
            "methods": rows,
        },
    )
    (args.output / "table.md").write_text(table(read_json(args.output / "result.json")))


def table(result: Mapping[str, Any]) -> str:
    """The rows, best first, as Markdown."""
    columns = ("method", "test top-1 (3 seeds)", "over the linear probe, 95 %", "trained", "stored", "bytes", "lr x")
    head = f"| {' | '.join(columns)} | s / step | of LoRA's |"
    lines = [head, "|" + "---|" * 9]
    rows = result["methods"]
    for name in sorted((n for n in rows if "mean" in rows[n]), key=lambda n: -rows[n]["mean"]):
        row = rows[name]
        gain = row.get("over_head_only")
        over = "" if gain is None else f"{gain[0] * 100:+.1f} [{gain[1] * 100:+.1f}, {gain[2] * 100:+.1f}]"
        trained = f"{row['trained']:,}" + ("" if row.get("fits", True) else " (smallest)")
        cells = (
            name,
            f"{row['mean'] * 100:.1f} ({', '.join(f'{v * 100:.1f}' for v in row['test_top1'])})",
            over,
            trained,
            f"{row['stored']:,}",
            f"{row['bytes']:,}",
            f"{row['lr_scale']:g}",
            f"{row['seconds_per_step']:.3f}" if "seconds_per_step" in row else "",
            f"{row['step_time_over_lora']:.2f}" if "step_time_over_lora" in row else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    left = [f"- {name}: {rows[name]['left out']}" for name in sorted(rows) if "left out" in rows[name]]
    return "\n".join(lines) + "\n" + ("\nLeft out:\n\n" + "\n".join(left) + "\n" if left else "")


if __name__ == "__main__":
    main()
