"""What searching adds to the default plan: the tiers `default`, `race` and `search` end to end, cell by cell.

    python studies/budget_frontier/tiers.py --assets ASSETS            # the bundled model
    python studies/budget_frontier/tiers.py --assets ASSETS --table    # the table from what has been run

Every tier is a whole `autopeft search --tier TIER` of the same study, in `runs/`. A finished one is a file
`tiers/MODEL_DATA_BUDGET_TIER.json` and is not run again; an unfinished one is continued. `protocol.md` says what is
compared.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inference import bootstrap, unpacked
from run import BUDGETS, DATA, MODELS, Cell, mix, packed, say

from autopeft.core.outcome import Outcome
from autopeft.core.record import Record
from autopeft.pipeline.costs import TIERS
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.search import run_search
from autopeft.store.atomic import read_json, write_json, write_text
from autopeft.store.paths import RunFolder

HERE = Path(__file__).parent
LEAST = 0.003
"""What a searched tier has to add, in points of accuracy."""


def run(cell: Cell, tier: str, assets: Path, runs: Path, device: str) -> dict[str, Any]:
    """One search, and what its record says."""
    study = cell.study(assets, device)
    search = dataclasses.replace(study.search, tier=tier, contenders=("head_only",))
    folder = RunFolder(runs / f"{cell.name}_{tier}")
    record = run_search(dataclasses.replace(study, search=search), folder, emit=say)
    winner = record.contenders[0]
    plan = read_plan(folder.root / next(t.plan for t in record.trials if t.number == winner.trial))
    own = {k: v for k, v in record.costs.items() if k not in ("baselines", "finish", "full_training")}
    full = record.costs["full_training"]
    ours = [t for t in record.trials if t.role != "baseline"]
    return {
        "cell": dataclasses.asdict(cell),
        "tier": tier,
        "winner": winner.name,
        "mix": mix(plan.allocation),
        "lr_scale": plan.study["train"]["lr_scale"],
        "spent": winner.spent,
        "limit": record.budget["limit"],
        "over_budget": sum(t.spent > record.budget["limit"] for t in record.trials),
        "trials": len(ours),
        "best_outer": max(t.rewards[0] for t in ours if t.rewards),
        "cost": round(sum(own.values()) / full, 4),
        "allowed": TIERS[tier],
        "costs": {k: round(v / full, 4) for k, v in record.costs.items()},
        "certificate": record.search.get("certificate"),
        "sizes": dict(record.data["sizes"]),
        "test_top1": [o.metrics["top1"] for o in winner.outcomes],
        "correct": correctness(folder, winner.outcomes),
        "probe_top1": probe(record),
        "environment": dict(record.environment),
        "seconds": record.seconds["total"],
    }


def correctness(folder: RunFolder, outcomes: Sequence[Outcome]) -> list[str]:
    """Packed correctness of each test picture, seed by seed."""
    ledger = Ledger(folder.root / "ledger")
    entries = [ledger.get(path.stem) for path in sorted((folder.root / "ledger").glob("*.json"))]
    found = {e.outcome.seed: e.merits for e in entries if e is not None and e.outcome in outcomes}
    return [packed(found[o.seed]) for o in outcomes]


def probe(record: Record) -> list[float]:
    """Test accuracies of the linear probe."""
    return [o.metrics["top1"] for c in record.contenders[1:] for o in c.outcomes if c.name == "head only"]


def matrix(row: Mapping[str, Any]) -> np.ndarray:
    """Whether each test picture was classified correctly, (seeds, pictures)."""
    return unpacked(row["correct"], row["sizes"]["test"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every tier of every cell, and the searched ones against the default over all cells."""
    cells: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(Cell(**row["cell"]).name, {})[row["tier"]] = row
    lines = [
        "Test accuracy in per cent, mean of three seeds; in brackets the tier minus the default tier, 95 %, seeds and",
        "pictures resampled. Cost in units of one full training, with scoring, decompositions and failed trials.",
        "",
        "| cell | probe | " + " | ".join(f"{tier} | cost | wins" for tier in TIERS) + " |",
        "|" + "---|" * (2 + 3 * len(TIERS)),
    ]
    for name, tiers in cells.items():
        probe_row = next(iter(tiers.values()))["probe_top1"]
        texts = [f"{100 * np.mean(probe_row):.1f}" if probe_row else ""]
        for tier in TIERS:
            if tier not in tiers:
                texts += ["", "", ""]
                continue
            row = tiers[tier]
            text = f"{100 * matrix(row).mean():.1f}"
            if tier != "default" and "default" in tiers:
                _, low, high = bootstrap([matrix(row) - matrix(tiers["default"])], over_cells=False)
                text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
            texts += [text, f"{row['cost']:.2f}", row["winner"].replace("race winner: ", "")]
        lines.append(f"| {name.replace('_', ', ')} | {' | '.join(texts)} |")
    lines += ["", "| tier minus default | cells | points | 95 % | verdict |", "|---|---|---|---|---|"]
    for tier in ("race", "search"):
        both = [t for t in cells.values() if tier in t and "default" in t]
        if both:
            mean, low, high = bootstrap([matrix(t[tier]) - matrix(t["default"]) for t in both])
            verdict = "better" if low > 0 and mean >= LEAST else "worse" if high < 0 else "tie"
            points = f"{100 * mean:+.1f} | [{100 * low:+.1f}, {100 * high:+.1f}]"
            lines.append(f"| {tier} | {len(both)} | {points} | {verdict} |")
    late = sum(row["cost"] > row["allowed"] for row in rows)
    over = sum(row["over_budget"] for row in rows)
    lines += ["", f"Searches above what their tier allows: {late} of {len(rows)}. Trials above the budget: {over}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--models", nargs="+", default=["bundled"], choices=sorted(MODELS))
    parser.add_argument("--data", nargs="+", default=list(DATA))
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    cells = [Cell(m, d, b) for m in args.models for b in args.budgets for d in args.data]
    for cell in () if args.table else cells:
        for tier in TIERS:
            path = args.output / "tiers" / f"{cell.name}_{tier}.json"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, run(cell, tier, args.assets, args.output / "runs", args.device))
    rows = [read_json(path) for path in sorted((args.output / "tiers").glob("*.json"))]
    text = table(rows)
    write_text(args.output / "tiers.md", text)
    print(text)


if __name__ == "__main__":
    main()
