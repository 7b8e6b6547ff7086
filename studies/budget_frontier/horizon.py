"""What tuning after a third of the epochs has cost: whole trainings at the rate that was chosen, and half a decade up.

    python studies/budget_frontier/horizon.py --assets ASSETS                      # every finished cell
    python studies/budget_frontier/horizon.py --assets ASSETS --cells vit-s14_cifar10_0.1%

Takes the variant and the rate that `run.py` has chosen for the default plan, the uniform core and uniform LoRA, trains
each in full on the inner split with one seed, and measures on the outer split; test splits stay sealed. Writes
`horizon.json` and `horizon.md`; cells that are in the file are not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run import STEP, Cell, at, say

from autopeft.pipeline.contenders import Candidate, contender
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import read_json, write_json, write_text

HERE = Path(__file__).parent
NAMES = {"uniform lora": "uniform_lora", "uniform core": "uniform_core"}


def run(known: Mapping[str, Any], assets: Path, output: Path, device: str) -> dict[str, Any]:
    """The outer split after whole trainings, contender by contender and rate by rate."""
    cell = Cell(**known["cell"])
    study = cell.study(assets, device)
    prepared = prepare(study, output / "ledger" / cell.name, {"unseal_token": cell.name})
    runner = Runner(prepared, Ledger(output / "ledger"), say)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("default plan", *NAMES):
        row = known["contenders"][name]
        if name == "default plan":
            candidate = Candidate(name, make_plan(prepared, study))
        else:
            group = contender(NAMES[name], prepared, study)
            candidate = next(c for c in group.candidates if c.name == row["variant"])
        for scale in (row["lr_scale"], row["lr_scale"] * STEP):
            own = at(candidate.under(study), scale, study.train.epochs)
            label = f"{cell.name}: {candidate.name} in full, learning rate x{scale:.3g}"
            entry = runner.train(own, candidate.allocation, label=label)
            found.setdefault(name, {})[f"{scale:.3g}"] = dict(entry.outcome.metrics)
    return {"sizes": dict(prepared.task.sizes), "contenders": found, "environment": environment_facts(prepared)}


def told(metrics: Mapping[str, float]) -> str:
    return f"{100 * metrics['top1']:.1f}, {metrics['nll']:.3f}" if metrics else "failed"


def table(result: Mapping[str, Any]) -> str:
    """Accuracy and negative log-likelihood at the chosen rate, then half a decade up."""
    names = ("default plan", *NAMES)
    lines = [f"| cell | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for cell, row in result.items():
        texts = []
        for name in names:
            rates = row["contenders"][name]
            texts.append("; ".join(f"x{rate}: {told(metrics)}" for rate, metrics in rates.items()))
        lines.append(f"| {cell} | {' | '.join(texts)} |")
    head = (
        "Accuracy in per cent and negative log-likelihood on the outer split after a whole training on the inner\n"
        "split, one seed, at the rate chosen after a third of the epochs and half a decade up.\n\n"
    )
    return head + "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--cells", nargs="*", help="names of cells; all that are finished when left out")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    path = args.output / "horizon.json"
    result = read_json(path) if path.exists() else {}
    for file in sorted((args.output / "cells").glob("*.json")):
        if file.stem not in result and (args.cells is None or file.stem in args.cells):
            result[file.stem] = run(read_json(file), args.assets, args.output, args.device)
            write_json(path, result)
            write_text(args.output / "horizon.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
