"""Constants fitted to measured gains on some cells, and what they are worth on cells that were left out.

    python studies/gain/fit.py --assets ASSETS --output studies/gain

Fits the constants of `autopeft.allocation.calibration.fit_calibration` (one per family of methods, the exponent, the
tilt over depth) to the energies of the study's own scorer, and ranks the options of every cell that has been measured
within bands of price, as `rank.py` does: by the constants that the house ships, by constants fitted to all other tasks,
to all other models, and to the development cells (the bundled model's) alone, with and without the tilt, and by depth
alone. Writes `fit.json` and `fit.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, Cell
from rank import correlation, interval, noise, over_bands

from autopeft.allocation.calibration import MeasuredGain, fit_calibration
from autopeft.allocation.gain import GainPolicy
from autopeft.pipeline.prepare import prepare
from autopeft.store.atomic import read_json, write_json, write_text

DEVELOPMENT = "bundled"


@dataclass(frozen=True)
class Options:
    """The measured options of a cell, with what the scorer says of them.

    Attributes:
        cell: the cell.
        bands: positions of the options of every band of price.
        measured: option by option; energies that the scorer puts at zero are a millionth of the largest.
        methods: method of each.
        groups: role group of each.
        shards: measured gains, (options, shards).
    """

    cell: Cell
    bands: Sequence[np.ndarray]
    measured: Sequence[MeasuredGain]
    methods: Sequence[str]
    groups: Sequence[str]
    shards: np.ndarray


def is_measured(cell: Cell, output: Path) -> bool:
    """Whether `measure.py` has finished the cell."""
    return (output / f"{cell.model}_{cell.data}.json").exists()


def read(cell: Cell, assets: Path, output: Path) -> Options:
    rows = read_json(output / f"{cell.model}_{cell.data}.json")["options"]
    study = cell.study(assets)
    known = prepare(study).energies(study)
    places = {(o.site, o.method, o.size): i for i, o in enumerate(known.options)}
    at = [places[row["site"], row["method"], row["size"]] for row in rows]
    least = 1e-6 * float(np.max(known.values))
    numbers = np.array([row["band"] for row in rows])
    return Options(
        cell,
        [np.flatnonzero(numbers == b) for b in sorted(set(numbers.tolist()))],
        [
            MeasuredGain(
                row["family"],
                max(float(known.values[i]), least),
                row["gain"],
                (cell.model, cell.data),
                float(known.depths[i]),
            )
            for row, i in zip(rows, at, strict=True)
        ],
        [row["method"] for row in rows],
        [known.groups[i] for i in at],
        np.array([row["shard_gains"] for row in rows]),
    )


def by_policy(policy: GainPolicy) -> Callable[[Options], np.ndarray]:
    """Gains as the packing sees them under a policy."""

    def predict(options: Options) -> np.ndarray:
        return np.array(
            [
                policy.correct(m.energy, method, group, m.depth, m.family)
                for m, method, group in zip(options.measured, options.methods, options.groups, strict=True)
            ]
        )

    return predict


def fitted_to(cells: Sequence[Options], tilted: bool) -> GainPolicy:
    """The policy that is fitted to the options of these cells."""
    measured = [m if tilted else dataclasses.replace(m, depth=0.0) for options in cells for m in options.measured]
    return fit_calibration(measured).policy()


def ranked(options: Options, every: Sequence[Options]) -> dict[str, Any]:
    """Correlations within bands of one cell, under each rule; rules that have nothing to be fitted to are left out."""
    own = options.cell
    fits = {
        "other tasks": [o for o in every if o.cell.data != own.data],
        "other models": [o for o in every if o.cell.model != own.model],
        "development": [o for o in every if o.cell.model == DEVELOPMENT] if own.model != DEVELOPMENT else [],
    }
    rules: dict[str, Callable[[Options], np.ndarray]] = {"shipped": by_policy(GainPolicy())}
    rules["energy alone"] = lambda o: np.array([m.energy for m in o.measured])
    rules["depth alone"] = lambda o: -np.array([m.depth for m in o.measured])
    for name, cells in fits.items():
        if cells:
            rules[f"{name}, no tilt"] = by_policy(fitted_to(cells, False))
            rules[f"{name}, tilt"] = by_policy(fitted_to(cells, True))
    gains = np.array([m.drop for m in options.measured])
    found: dict[str, Any] = {}
    for name, rule in rules.items():
        predicted = rule(options)
        found[name] = {
            "within_bands": over_bands(options.bands, predicted, gains, correlation),
            "interval": interval(options.bands, predicted, gains),
        }
    return {"options": len(gains), **noise(options.bands, options.shards), "rules": found}


def table(result: Mapping[str, Any]) -> str:
    cells = list(result)
    names: list[str] = []
    for cell in cells:
        names += [name for name in result[cell]["rules"] if name not in names]
    lines = [f"| constants | {' | '.join(cells)} |", "|" + "---|" * (len(cells) + 1)]
    ceilings = [f"{result[cell]['ceiling']:.2f}" for cell in cells]
    lines.append(f"| *true gains* | {' | '.join(ceilings)} |")
    for name in names:
        texts = []
        for cell in cells:
            row = result[cell]["rules"].get(name)
            texts.append(
                f"{row['within_bands']:.2f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]" if row else ""
            )
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    every = [read(cell, args.assets, args.output) for cell in CELLS if is_measured(cell, args.output)]
    result = {options.cell.name: ranked(options, every) for options in every}
    develop = [o for o in every if o.cell.model == DEVELOPMENT]
    fitted = {"development": develop, "all": every}
    constants = {
        name: {"exponent": p.exponent, "calibration": dict(p.calibration), "depth_tilt": p.depth_tilt}
        for name, cells in fitted.items()
        for p in (fitted_to(cells, True),)
    }
    write_json(args.output / "fit.json", {"cells": result, "fitted to": constants})
    write_text(args.output / "fit.md", table(result))
    print(table(result))
    print(constants)


if __name__ == "__main__":
    main()
