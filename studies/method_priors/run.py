"""One method at a time on the menu, at one budget: where the default gain multipliers come from.

    python studies/method_priors/run.py --output studies/method_priors/result.json

Every method alone, and all of them with and without the calibration, packs the same budget with the same scores and
solver, and is trained at three learning rates with two seeds on the inner split. The outer split is measured; the test
split stays sealed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from autopeft.config.study import Study
from autopeft.core.codec import encode
from autopeft.errors import InfeasibleBudget
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import write_json

SCALES = (0.316, 1.0, 3.16)


def say(event: Event) -> None:
    print(event.text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", default="0.1%")
    args = parser.parse_args()
    # Adapters that cannot be merged are measured too.
    study = dataclasses.replace(Study(), budget=args.budget, mergeable=False)
    prepared = prepare(study)
    runner = Runner(prepared, Ledger(args.output.parent / "ledger"), say)
    rows = {}
    plain = dataclasses.replace(study, gain=dataclasses.replace(study.gain, calibration={}))
    menus = {name: dataclasses.replace(plain, methods={name: method}) for name, method in study.methods.items()}
    menus |= {"all, not calibrated": plain, "all, calibrated": study}
    for name, one in menus.items():
        try:
            plan = make_plan(prepared, one)
        except InfeasibleBudget as error:
            rows[name] = {"infeasible": str(error)}
            continue
        tried = {}
        for scale in SCALES:
            train = dataclasses.replace(study.train, epochs=args.epochs, lr_scale=scale)
            trained = dataclasses.replace(one, train=train)
            tried[scale] = [
                runner.train(trained, plan, label=f"{name} x{scale}", seed=seed).outcome for seed in range(args.seeds)
            ]
        mean = {
            scale: sum(o.metrics.get("top1", 0.0) for o in outcomes) / args.seeds for scale, outcomes in tried.items()
        }
        best = max(mean, key=lambda scale: mean[scale])
        mix: dict[str, int] = {}
        for option in plan:
            mix[option.method] = mix.get(option.method, 0) + option.cost.trainable
        rows[name] = {
            "spent": plan.spent,
            "mix": mix,
            "lr_scale": best,
            "outer_top1": round(mean[best], 4),
            "outer_nll": round(sum(o.metrics["nll"] for o in tried[best]) / args.seeds, 4),
            "by_scale": {str(scale): round(value, 4) for scale, value in mean.items()},
        }
    result = {
        "settings": {"epochs": args.epochs, "seeds": args.seeds, "budget": args.budget, "gain": encode(study.gain)},
        "sizes": dict(prepared.task.sizes),
        "environment": environment_facts(prepared),
        "methods": rows,
    }
    write_json(args.output, result)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
