"""What single options are worth: each is trained alone, beside the head, and compared with the head alone.

    python studies/gain/measure.py --assets ASSETS --output studies/gain

ASSETS holds the files that `studies/assets/convert.py` makes. Options are drawn from the default menu of every cell in
turn from bands of price and families of methods, so that prices within a band compare. Each is trained once at each
learning rate, with the seed, the order and the head that the head alone has, and at half a decade more for as long as
the largest rate is the best, twice at most; its gain is the decrease of the negative log-likelihood on the outer split,
at the rate that gives the largest, in all and shard by shard of that split. `scaled_gain` is the same at each's best
temperature, which no mere softening of the outputs can raise. The test split stays sealed. Writes one file per cell,
`CELL.json`; trainings that the ledger holds are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cells import BANDS, CELLS, Cell, alone, band_of, sampled

from autopeft.core.allocation import Allocation
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Entry, Ledger
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.store.atomic import write_json

STEP = 10**0.5
EXTENSIONS = 2


def say(event: Event) -> None:
    print(event.text, flush=True)


def gain(head: Entry, entry: Entry, metric: str = "nll") -> float:
    """Decrease of the negative log-likelihood on the outer split."""
    return head.outcome.metrics[metric] - entry.outcome.metrics[metric]


def measured(cell: Cell, assets: Path, output: Path, count: int, seed: int) -> None:
    study = cell.study(assets)
    prepared = prepare(study, output / "ledger" / cell.name.replace(" ", "_"))
    runner = Runner(prepared, Ledger(output / "ledger"), say)
    families = {key: method.family for key, method in study.methods.items()}
    limit = prepared.budget.limit
    head = runner.train(study, Allocation((), prepared.budget), label=f"{cell.name}: head only")
    rows = []
    for option in sampled(prepared.energies(study).options, families, limit, count, seed):
        plan = alone(prepared, option)
        done: dict[float, Entry] = {}
        scales = list(cell.scales)
        for scale in scales:
            one = dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale))
            entry = runner.train(one, plan, label=f"{option.key} {option.size} x{scale:.3g}")
            if entry.outcome.status == "done":
                done[scale] = entry
            is_best = scale in done and max(done, key=lambda s: gain(head, done[s])) == scale
            if is_best and scale == scales[-1] and len(scales) < len(cell.scales) + EXTENSIONS:
                scales.append(scale * STEP)
        if not done:
            continue
        best = max(done, key=lambda s: gain(head, done[s]))
        site = prepared.catalog[option.site]
        rows.append(
            {
                "site": option.site,
                "method": option.method,
                "family": families[option.method],
                "size": option.size,
                "cost": option.cost.trainable,
                "band": band_of(option.cost.trainable, limit),
                "role": site.role,
                "depth": site.depth,
                "gain": gain(head, done[best]),
                "scaled_gain": gain(head, done[best], "scaled_nll"),
                "top1_gain": done[best].outcome.metrics["top1"] - head.outcome.metrics["top1"],
                "lr_scale": best,
                "gain_by_scale": {str(s): gain(head, entry) for s, entry in done.items()},
                "shard_gains": [a - b for a, b in zip(head.shards, done[best].shards, strict=True)],
            }
        )
    result = {
        "cell": dataclasses.asdict(cell),
        "seed": seed,
        "budget": limit,
        "bands": BANDS,
        "sizes": dict(prepared.task.sizes),
        "head": dict(head.outcome.metrics),
        "environment": environment_facts(prepared),
        "options": rows,
    }
    write_json(output / f"{cell.model}_{cell.data}.json", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS])
    args = parser.parse_args()
    for cell in CELLS:
        if cell.name in args.cells:
            measured(cell, args.assets, args.output, args.count, args.seed)


if __name__ == "__main__":
    main()
