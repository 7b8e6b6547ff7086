"""The tables of the budget frontier from its finished cells; `protocol.md` says which figures.

    python studies/budget_frontier/tables.py

Writes `table.md` and `result.json` beside `cells/`. A cell that has not been run is not there; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inference import bootstrap, gap_closed, holm, sign_flip, unpacked

from autopeft.store.atomic import read_json, write_json, write_text

HERE = Path(__file__).parent
OURS, PROBE, CEILING = "default plan", "head only", "full fine-tuning"
PRIMARIES = ("uniform lora", "spt-lora", "single method", "random mix")
DEVELOPMENT = {("bundled", "digits"), ("bundled", "animals")}
LEAST_GAP = 0.02

Cell = Mapping[str, Any]


def correct(cell: Cell, name: str) -> np.ndarray:
    """Whether each test picture was classified correctly, (seeds, pictures)."""
    return unpacked(cell["contenders"][name]["correct"], cell["sizes"]["test"])


def difference(cell: Cell, first: str, second: str) -> np.ndarray:
    return correct(cell, first) - correct(cell, second)


def confirms(cell: Cell) -> bool:
    return (cell["cell"]["model"], cell["cell"]["data"]) not in DEVELOPMENT


def has_gap(cell: Cell) -> bool:
    mean, low, _ = bootstrap([difference(cell, CEILING, PROBE)], over_cells=False)
    return mean >= LEAST_GAP and low > 0


def over(cells: Sequence[Cell], name: str) -> dict[str, Any]:
    """The default plan minus a contender, over cells."""
    matrices = [difference(cell, OURS, name) for cell in cells if name in cell["contenders"]]
    if not matrices:
        return {}
    mean, low, high = bootstrap(matrices)
    return {
        "cells": len(matrices),
        "mean": mean,
        "interval": [low, high],
        "p": sign_flip([float(m.mean()) for m in matrices]),
    }


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """What is said of cells together, per budget."""
    found: dict[str, Any] = {}
    for budget in sorted({cell["cell"]["budget"] for cell in cells}):
        here = [cell for cell in cells if cell["cell"]["budget"] == budget]
        rows = {name: over(here, name) for name in here[0]["contenders"] if name != OURS}
        rows = {name: row for name, row in rows.items() if row}
        adjusted = holm({name: rows[name]["p"] for name in PRIMARIES if name in rows})
        for name, p in adjusted.items():
            rows[name]["holm"] = p
        wide = [cell for cell in here if has_gap(cell)]
        closed = {}
        for name in (*PRIMARIES, "uniform core", OURS):
            known = [cell for cell in wide if name in cell["contenders"]]
            if known:
                share, low, high = gap_closed(
                    [difference(c, name, PROBE) for c in known], [difference(c, CEILING, PROBE) for c in known]
                )
                closed[name] = {"cells": len(known), "share": share, "interval": [low, high]}
        found[budget] = {"default plan minus": rows, "gap closed": closed}
    return found


def cell_table(cells: Sequence[Cell]) -> str:
    names: list[str] = []
    for cell in cells:
        names += [name for name in cell["contenders"] if name not in names]
    lines = [f"| cell | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for cell in cells:
        c = cell["cell"]
        texts = []
        for name in names:
            if name not in cell["contenders"]:
                texts.append("")
                continue
            mean = 100 * correct(cell, name).mean()
            text = f"{mean:.1f}"
            if name != OURS:
                _, low, high = bootstrap([difference(cell, OURS, name)], over_cells=False)
                text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
            texts.append(text)
        mark = "" if confirms(cell) else " (dev.)"
        lines.append(f"| {c['model']}, {c['data']}, {c['budget']}{mark} | {' | '.join(texts)} |")
    return "\n".join(lines)


def summary_table(found: Mapping[str, Any]) -> str:
    lines = [
        "| budget | default plan minus | cells | points | 95 % | sign-flip p | Holm |",
        "|---|---|---|---|---|---|---|",
    ]
    for budget, part in found.items():
        for name, row in part["default plan minus"].items():
            low, high = row["interval"]
            adjusted = f"{row['holm']:.3f}" if "holm" in row else ""
            lines.append(
                f"| {budget} | {name} | {row['cells']} | {100 * row['mean']:+.1f} | [{100 * low:+.1f}, "
                f"{100 * high:+.1f}] | {row['p']:.3f} | {adjusted} |"
            )
    lines += ["", "| budget | gap closed by | cells | share | 95 % |", "|---|---|---|---|---|"]
    for budget, part in found.items():
        for name, row in part["gap closed"].items():
            low, high = row["interval"]
            lines.append(f"| {budget} | {name} | {row['cells']} | {row['share']:.0%} | [{low:.0%}, {high:.0%}] |")
    return "\n".join(lines)


def cost_table(cells: Sequence[Cell]) -> str:
    names: list[str] = []
    for cell in cells:
        names += [name for name in cell["contenders"] if name not in names]
    lines = ["| contender | choosing it costs, full trainings | over budget |", "|---|---|---|"]
    for name in names:
        rows = [(c, c["contenders"][name]) for c in cells if name in c["contenders"]]
        over_it = sum(row["spent"] > c["limit"] for c, row in rows) if name != CEILING else 0
        lines.append(f"| {name} | {np.mean([row['cost'] for _, row in rows]):.2f} | {over_it} of {len(rows)} |")
    return "\n".join(lines)


def main() -> None:
    cells = [read_json(path) for path in sorted((HERE / "cells").glob("*.json"))]
    parts = [
        "Test accuracy in per cent, mean of three seeds; in brackets the default plan minus the contender, 95 %.",
        cell_table(cells),
    ]
    result = {}
    for label, some in (
        ("Confirmation cells", [c for c in cells if confirms(c)]),
        ("Development cells, no evidence", [c for c in cells if not confirms(c)]),
    ):
        if some:
            result[label] = summary(some)
            parts += [f"## {label}", summary_table(result[label])]
    parts += ["## Cost", cost_table(cells)]
    write_json(HERE / "result.json", result)
    write_text(HERE / "table.md", "\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
