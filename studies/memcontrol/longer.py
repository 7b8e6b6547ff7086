"""Whether full fine-tuning comes to pay for what it memorises when it goes on: the same trainings, longer.

    python studies/memcontrol/run.py
    python studies/memcontrol/longer.py

Full fine-tuning, unmasked SV-DIFF and the found mask are trained on inner at the rates that `run.py` has chosen, once
as long as there and once per further factor, and looked at on the outer split; the test split stays sealed. One seed:
this asks for the cause of a result, it is none itself. Writes `longer.json`; the ledger resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from run import BASE, COLUMNS, FULL, GROUPS, HERE, REPORTED, say, study_of, whole_methods, with_mask

from autopeft.config.decode import load_study
from autopeft.config.study import Study
from autopeft.core.allocation import Allocation
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import read_json, write_json

FOUND = "found, knee"


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """A row per contender and length."""
    masks = read_json(args.result)
    settings, chosen = masks["settings"], masks["contenders"]
    study = study_of(settings["epochs"], settings["trials"])
    prepared = prepare(study, args.output / "ledger" / "longer" / "run")
    runner = Runner(prepared, Ledger(args.output / "ledger" / "longer"), say)
    whole = whole_methods(prepared, study)
    contenders: dict[str, tuple[Study, Allocation]] = {}
    for name in (FULL, BASE):
        one, plan = whole[name]
        contenders[name] = (
            dataclasses.replace(one, train=dataclasses.replace(one.train, lr_scale=chosen[name]["lr_scale"])),
            plan,
        )
    masked = with_mask(study, {group: int(group in chosen[FOUND]["on"]) for group in GROUPS})
    rates = dataclasses.replace(study.train.lr, core=chosen[FOUND]["lr"])
    masked = dataclasses.replace(masked, train=dataclasses.replace(masked.train, lr=rates))
    contenders[FOUND] = masked, make_plan(prepared, masked)
    rows: list[dict[str, Any]] = []
    for factor in args.factors:
        for name, (one, plan) in contenders.items():
            train = dataclasses.replace(one.train, epochs=settings["epochs"] * factor)
            longer = dataclasses.replace(one, train=train, reward=load_study([], {"reward": REPORTED}).reward)
            outcome = runner.train(longer, plan, label=f"{name}, {train.epochs} epochs", seed=1).outcome
            row = {"contender": name, "epochs": train.epochs, "parameters": plan.trainable, "status": outcome.status}
            rows.append(row | {c: round(outcome.metrics[c], 4) for c in COLUMNS if c in outcome.metrics})
    return {"seed": 1, "rows": rows, "environment": environment_facts(prepared)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="+", default=(1, 3))
    parser.add_argument("--result", type=Path, default=HERE / "result.json", help="what run.py has written")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    write_json(args.output / "longer.json", measured(args))


if __name__ == "__main__":
    main()
