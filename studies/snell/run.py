"""SNELL and SNELLA beside LoRA of equal trainable count and SPT: accuracy on the bundled task and on a ViT-S/14.

    python studies/snell/run.py bundled
    python studies/snell/run.py vit_s --weights vit_small_patch14.safetensors --pictures cifar10

LoRA, SNELL and SNELLA take the projections to queries, keys and values of every block at one rank; that sets the budget
of SPT, which chooses its own places in the whole model, strictly. SNELLA trains three scalars more per matrix. Every
contender tries the same learning rates, half a decade apart and on beyond a best at the edge, with one seed on the
outer split, and is then trained at its best on the inner split with three seeds. The test split is opened once, after
the last choice. Trainings that the ledger beside the result holds are not repeated, so an interrupted study goes on.
Each part writes its rows into `result.json`, and both into `table.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.allocation.spt import SPT
from autopeft.config.study import DataSettings, Study
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.lora import LoRA
from autopeft.methods.snell import SNELL
from autopeft.methods.snella import SNELLA
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.contenders import spt_scores
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.finish import paired_interval
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import read_json, write_json

GROUP = "*:attn.qkv"
SCALES = {"bundled": (0.316, 1.0, 3.16, 10.0, 31.6, 100.0), "vit_s": (0.316, 1.0, 3.16, 10.0)}
STEP = 3.16
FURTHER = 2
SEEDS = (1, 2, 3)
HEAD_ONLY = "head only"
BESIDE = ("lora", "spt")

Contender = tuple[Study, Allocation]


def say(event: Event) -> None:
    print(event.text, flush=True)


def study_of(part: str, weights: str, pictures: str) -> Study:
    """Model, data and length of a part."""
    if part == "bundled":
        return Study(data=DataSettings(batch_size=32))
    model = ModelSpec("vit_small_patch14_dinov2", pretrained_path=weights, img_size=42)
    data = DataSettings(pictures, batch_size=16, max_samples=400, val_frac=0.2, test_frac=0.5)
    return Study(model=model, data=data)


def contenders(prepared: Prepared, study: Study, rank: int) -> dict[str, Contender]:
    """Who competes, each with its plan."""
    catalog = prepared.catalog
    (group,) = (s for s in catalog.offered("whole") if s.name == GROUP)
    methods: dict[str, Method] = {"lora": LoRA(), "snell": SNELL(), "snella": SNELLA()}
    members = SNELLA().members(group)
    found: dict[str, Contender] = {}
    for name, method in methods.items():
        sites: Sequence[Site] = (group,) if name == "snella" else members
        options = [
            Option(s.name, name, rank, method.cost(s, rank), 0.0, places_of(catalog, method, s))
            for s in sorted(sites, key=lambda s: s.name)
        ]
        limit = sum(o.cost.trainable for o in options)
        one = dataclasses.replace(study, methods={name: method}, mergeable=False)
        found[name] = one, Allocation(tuple(options), Budget(limit))
    limit = found["lora"][1].trainable
    menu = Menu((), {s.name: s for s in catalog.candidates("slices")}, spt_scores(prepared.scores))
    found["spt"] = study, SPT(methods=study.methods).allocate(menu, Budget(limit), study.seed)
    return found


def tuned(
    runner: Runner, study: Study, plan: Allocation, name: str, scales: Sequence[float]
) -> tuple[float, Mapping[str, float | None]]:
    """The learning-rate scale of the best outer split, and what every scale gave; None where it diverged."""
    tried: dict[float, tuple[float, float, float]] = {}

    def attempt(scale: float) -> None:
        one = dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale))
        tried[scale] = runner.rank(one, runner.train(one, plan, label=f"{name} x{scale:g}").outcome)

    def best() -> float:
        return max(tried, key=lambda scale: tried[scale])

    for scale in scales:
        attempt(scale)
    # A best rate at the edge of the grid would be a rate that was not tuned.
    for _ in range(FURTHER):
        if best() == max(tried):
            attempt(best() * STEP)
        elif best() == min(tried):
            attempt(best() / STEP)
    return best(), {
        f"{scale:g}": round(s, 4) if math.isfinite(s := tried[scale][1]) else None for scale in sorted(tried)
    }


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of one part."""
    study = study_of(args.part, args.weights, args.pictures)
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, epochs=args.epochs, threads=1))
    folder = args.output / "ledger" / args.part
    prepared = prepare(study, folder / "run", {"unseal_token": "snell"})
    runner = Runner(prepared, Ledger(folder), say)
    chosen: dict[str, Contender] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (one, plan) in contenders(prepared, study, args.rank).items():
        # A head at another rate would confound the comparison, so only the adapters' rates are scaled.
        scale, by_scale = tuned(runner, one, plan, name, SCALES[args.part])
        chosen[name] = dataclasses.replace(one, train=dataclasses.replace(one.train, lr_scale=scale)), plan
        rows[name] = {
            "trained": plan.trainable,
            "changed": sum(o.cost.entries for o in plan),
            "options": len(plan),
            "lr_scale": scale,
            "outer_by_scale": by_scale,
        }
    chosen[HEAD_ONLY] = study, Allocation((), prepared.budget)
    rows[HEAD_ONLY] = {"trained": 0, "changed": 0, "options": 0, "lr_scale": 1.0}
    if args.look:
        return rows

    prepared.task.unseal_test()
    entries = {
        name: [runner.train(one, plan, label=name, seed=seed, measure="test") for seed in SEEDS]
        for name, (one, plan) in chosen.items()
    }
    correct = {name: [entry.merits for entry in found] for name, found in entries.items()}
    for name, found in entries.items():
        values = [entry.outcome.metrics["top1"] for entry in found]
        rows[name] |= {
            "test_top1": [round(value, 4) for value in values],
            "mean": round(statistics.fmean(values), 4),
            "seconds": round(min(entry.outcome.seconds for entry in found), 1),
        }
        for other in (*BESIDE, HEAD_ONLY):
            if name != other:
                gain = float(np.mean(correct[name]) - np.mean(correct[other]))
                low, high = paired_interval(correct[name], correct[other])
                rows[name][f"over {other}"] = [round(gain, 4), round(low, 4), round(high, 4)]
    return {
        "settings": {
            "model": dataclasses.replace(study.model, pretrained_path=None).spec,
            "img_size": study.model.img_size,
            "epochs": args.epochs,
            "rank": args.rank,
            "scales": SCALES[args.part],
            "places": GROUP,
            "seeds": SEEDS,
        },
        "sizes": dict(prepared.task.sizes),
        "environment": environment_facts(prepared),
        "contenders": rows,
    }


def table(result: Mapping[str, Any]) -> str:
    """Both parts, best first, as Markdown."""
    lines: list[str] = []
    for _, found in sorted(result.items()):
        settings, sizes = found["settings"], found["sizes"]
        lines += [
            f"## {settings['model']}, rank {settings['rank']}, {settings['epochs']} epochs, "
            f"{sizes['inner']} / {sizes['outer']} / {sizes['test']} pictures",
            "",
            "| contender | test top-1 (3 seeds) | over LoRA, 95 % | over SPT, 95 % | over the head, 95 % "
            "| trained | changed entries | lr x |",
            "|" + "---|" * 8,
        ]
        rows = found["contenders"]
        for name in sorted(rows, key=lambda n: -rows[n]["mean"]):
            row = rows[name]
            cells = (
                name,
                f"{row['mean'] * 100:.1f} ({', '.join(f'{v * 100:.1f}' for v in row['test_top1'])})",
                *(_interval(row.get(f"over {other}")) for other in (*BESIDE, HEAD_ONLY)),
                f"{row['trained']:,}",
                f"{row['changed']:,}",
                f"{row['lr_scale']:g}",
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _interval(gain: Sequence[float] | None) -> str:
    return "" if gain is None else f"{gain[0] * 100:+.1f} [{gain[1] * 100:+.1f}, {gain[2] * 100:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bundled", "vit_s"))
    parser.add_argument("--weights", default="", help="of vit_s; see studies/assets")
    parser.add_argument("--pictures", default="", help="of vit_s, one folder per class")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--look", action="store_true", help="tune and print; the test split stays shut")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.part == "vit_s" and not (args.weights and args.pictures):
        raise UsageError("vit_s needs --weights and --pictures; studies/assets says where they come from")
    found = measured(args)
    if args.look:
        print(found)
        return
    path = args.output / "result.json"
    result = read_json(path) if path.exists() else {}
    write_json(path, {**result, args.part: found})
    (args.output / "table.md").write_text(table(read_json(path)))


if __name__ == "__main__":
    main()
