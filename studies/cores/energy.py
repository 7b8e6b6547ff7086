"""How much of the gradient core matrices reach, on the pictures their bases were made from and on others.

    python studies/cores/energy.py --assets ASSETS --output studies/cores [--cells NAME ...]

One core of the same size on every matrix, the largest that a budget pays for. The energy is that of the plain mean
gradient: summed over the matrices, the squared norm of what `U^T G V` holds, as a share of the squared norm of G. It is
taken with the gradient of the inner split, which the bases that look at data were made from, and with that of the outer
split, which they have not seen. Nothing is trained but the short fine-tuning behind `trajectory`, and the test split
stays closed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from run import Cell, cells
from torch import Tensor

from autopeft.config.study import DataSettings, Study
from autopeft.core.outcome import Split
from autopeft.core.site import Site
from autopeft.methods._core_bases import Basis, chosen_bases
from autopeft.methods.core import Core
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.scoring.borrow import borrowed
from autopeft.scoring.gradient import Gradient
from autopeft.store.atomic import read_json, write_json

SHARES = {"0.01%": 1e-4, "0.1%": 1e-3, "0.5%": 5e-3}


def gradients(prepared: Prepared, split: Split, sites: list[Site]) -> dict[str, Tensor]:
    """The gradient of the mean loss of a split, per matrix, flattened to (out, in)."""
    parameters = {s.name: prepared.model.get_parameter(f"{s.module}.{s.parameter}") for s in sites}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    seen = 0
    with borrowed(prepared.model, parameters.values()), torch.enable_grad():
        for images, labels in prepared.task.batches(split):
            loss = prepared.task.loss(prepared.model, (images, labels))
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient * len(images)
            seen += len(images)
    return {name: (total / seen).flatten(1).cpu() for name, total in sums.items()}


def measured(cell: Cell) -> dict[str, Any]:
    """Shares of energy by budget, basis and split."""
    base = Study()
    methods = {basis: Core(basis) for basis in get_args(Basis)}
    study = dataclasses.replace(
        base,
        model=cell.model,
        data=DataSettings(cell.data, max_inner=cell.inner, batch_size=16),
        methods=methods,
        scorer=Gradient(),
        train=dataclasses.replace(base.train, epochs=cell.epochs, threads=1),
    )
    prepared = prepare(study)
    sites = [s for s in prepared.catalog.offered("whole") if s.is_matrix and "weight" in s.slots]
    splits: dict[str, dict[str, Tensor]] = {split: gradients(prepared, split, sites) for split in ("inner", "outer")}
    scores = prepared.scores_for(study)
    whole = {split: sum(float(g.square().sum()) for g in found.values()) for split, found in splits.items()}
    sizes = {text: math.isqrt(int(share * prepared.catalog.n_base) // len(sites)) for text, share in SHARES.items()}
    held: dict[str, dict[str, dict[str, float]]] = {text: {} for text, r in sizes.items() if r}
    for basis in get_args(Basis):
        total = {(text, split): 0.0 for text in held for split in splits}
        for site in sites:
            u, v = chosen_bases(basis, site, scores.evidence[site.name]["weight"], 0)
            for split, found in splits.items():
                squares = (u.T @ found[site.name] @ v).double().square()
                for text in held:
                    total[text, split] += float(squares[: sizes[text], : sizes[text]].sum())
        for text in held:
            held[text][basis] = {split: round(total[text, split] / whole[split], 5) for split in splits}
    flat = {split: torch.cat([g.flatten() for g in found.values()]) for split, found in splits.items()}
    return {
        "sizes": dict(prepared.task.sizes),
        "matrices": len(sites),
        "core": {text: sizes[text] for text in held},
        "cosine": round(float(torch.cosine_similarity(flat["inner"], flat["outer"], 0)), 4),
        "basis_samples": prepared.basis_samples,
        "share": held,
    }


def table(result: Mapping[str, Any]) -> str:
    """One table per cell."""
    lines: list[str] = []
    for name, cell in result.items():
        core = ", ".join(f"{text}: {r} x {r}" for text, r in cell["core"].items())
        lines += [
            f"## {name}",
            "",
            f"{core} on {cell['matrices']} matrices; cosine of the two gradients {cell['cosine']:.2f}.",
            "",
        ]
        lines.append("| basis | " + " | ".join(f"{t}, {s}" for t in cell["share"] for s in ("inner", "outer")) + " |")
        lines.append("|---" * (1 + 2 * len(cell["share"])) + "|")
        for basis in get_args(Basis):
            values = [cell["share"][t][basis][s] for t in cell["share"] for s in ("inner", "outer")]
            lines.append(f"| `{basis}` | " + " | ".join(f"{100 * v:.2f} %" for v in values) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cells", nargs="*")
    args = parser.parse_args()
    known = {name.removesuffix(" 0.1%"): cell for name, cell in cells(args.assets).items() if cell.budget == "0.1%"}
    path = args.output / "energy.json"
    for name in args.cells or known:
        found = {**(read_json(path) if path.is_file() else {}), name: measured(known[name])}
        result = {key: found[key] for key in known if key in found}
        write_json(path, result)
        (args.output / "energy.md").write_text(table(result))
        print(table({name: found[name]}), flush=True)


if __name__ == "__main__":
    main()
