"""How well each scorer foretells what `measure.py` measured.

    python studies/gain/rank.py --assets ASSETS --output studies/gain

For every measured cell and every scorer of the house at its defaults: the Spearman correlation of predicted and
measured gains within each band of price, averaged over the bands by their options; over all options; and the regret,
the share of the best measured gain of a band that is lost by taking the option with the largest prediction, averaged
likewise.
Intervals are bootstrapped over the options of a band. The ceiling is the correlation that the true gains would have:
the root of the reliability of the measurement, which is the correlation within bands between the gains on two random
halves of the outer split's shards, averaged over splits, at full length by Spearman and Brown's formula (1910). It
leaves out what another order of the training would change, and is too high for that. `energy` is the share of the
model's energy that the scorer says an option captures; `menu` is the gain that a plan is packed by, after the
calibration of families and the exponent. Writes `result.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, Cell
from scipy.stats import spearmanr

from autopeft.config.registries import SCORERS
from autopeft.config.study import Study
from autopeft.errors import AutopeftError
from autopeft.pipeline.plan import make_menu
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.store.atomic import read_json, write_json, write_text

DRAWS = 1000
SPLITS = 300


def correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return 0.0
    return float(spearmanr(predicted, measured).statistic)


def regret(predicted: np.ndarray, measured: np.ndarray) -> float:
    best = measured.max()
    return float((best - measured[int(np.argmax(predicted))]) / best) if best > 0 else 0.0


def over_bands(bands: Sequence[np.ndarray], predicted: np.ndarray, measured: np.ndarray, of: Any) -> float:
    """Mean over the bands, weighted by their options."""
    values = [of(predicted[band], measured[band]) for band in bands]
    return float(np.average(values, weights=[len(band) for band in bands]))


def interval(bands: Sequence[np.ndarray], predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """95 % of bootstrapped correlations within bands."""
    rng = np.random.default_rng(0)
    values = [
        over_bands([rng.choice(band, len(band)) for band in bands], predicted, measured, correlation)
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def reliability(bands: Sequence[np.ndarray], shards: np.ndarray) -> float:
    """Of gains that were measured on all shards, (options, shards); 0 where halves do not agree at all."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(SPLITS):
        order = rng.permutation(shards.shape[1])
        first, second = np.array_split(order, 2)
        values.append(over_bands(bands, shards[:, first].mean(1), shards[:, second].mean(1), correlation))
    half = max(0.0, float(np.mean(values)))
    return 2 * half / (1 + half)


def noise(bands: Sequence[np.ndarray], shards: np.ndarray) -> dict[str, Any]:
    """How well the gains are known: also how many are clear of zero by two standard errors over shards."""
    known = reliability(bands, shards)
    errors = shards.std(1, ddof=1) / shards.shape[1] ** 0.5
    return {
        "reliability": known,
        "ceiling": known**0.5,
        "clear_of_zero": int((np.abs(shards.mean(1)) > 2 * errors).sum()),
    }


def predictions(prepared: Prepared, study: Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Predicted gains of the measured options; 0 for one that this scorer's menu does not have."""
    found = {}
    for label, options in (("energy", prepared.energies(study).options), ("menu", make_menu(prepared, study).options)):
        known = {(o.site, o.method, o.size): o.gain for o in options}
        found[label] = np.array([known.get((r["site"], r["method"], r["size"]), 0.0) for r in rows])
    return found


def ranked(cell: Cell, assets: Path, output: Path, scorers: Sequence[str]) -> dict[str, Any]:
    rows = read_json(output / f"{cell.model}_{cell.data}.json")["options"]
    measured = np.array([row["gain"] for row in rows])
    numbers = np.array([row["band"] for row in rows])
    bands = [np.flatnonzero(numbers == b) for b in sorted(set(numbers.tolist()))]
    found = {}
    for name in scorers:
        study = dataclasses.replace(cell.study(assets), scorer=SCORERS[name]())
        try:
            prepared = prepare(study)
            predicted = predictions(prepared, study, rows)
        except AutopeftError as error:
            found[name] = {"left out": str(error)}
            continue
        found[name] = {"seconds": round(prepared.seconds.get("scores", 0.0), 2)}
        for label, values in predicted.items():
            found[name][label] = {
                "within_bands": over_bands(bands, values, measured, correlation),
                "interval": interval(bands, values, measured),
                "overall": correlation(values, measured),
                "regret": over_bands(bands, values, measured, regret),
                "predicted": values.tolist(),
            }
        print(cell.name, name, {k: v for k, v in found[name]["menu"].items() if k != "predicted"}, flush=True)
    return {"options": len(rows), **noise(bands, np.array([row["shard_gains"] for row in rows])), "scorers": found}


def table(result: Mapping[str, Any]) -> str:
    """Scorers in rows, cells in columns: the correlation within bands and the regret of the packed gain."""
    cells = list(result)
    names = sorted({name for cell in cells for name in result[cell]["scorers"]})
    lines = [f"| scorer | {' | '.join(cells)} | mean |", "|" + "---|" * (len(cells) + 2)]

    def cell_text(cell: str, name: str) -> str:
        row = result[cell]["scorers"].get(name, {})
        if "menu" not in row:
            return ""
        low, high = row["menu"]["interval"]
        return f"{row['menu']['within_bands']:.2f} [{low:.2f}, {high:.2f}], {row['menu']['regret']:.2f}"

    def mean(name: str) -> float:
        known = [result[c]["scorers"].get(name, {}).get("menu") for c in cells]
        return float(np.mean([k["within_bands"] if k else 0.0 for k in known]))

    ceilings = [result[cell]["ceiling"] for cell in cells]
    lines.append(f"| *true gains* | {' | '.join(f'{c:.2f}' for c in ceilings)} | {np.mean(ceilings):.2f} |")
    for name in sorted(names, key=lambda n: -mean(n)):
        lines.append(f"| `{name}` | {' | '.join(cell_text(c, name) for c in cells)} | {mean(name):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--scorers", nargs="*", default=list(SCORERS))
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS], help="others stay as they are")
    args = parser.parse_args()
    path = args.output / "result.json"
    result = read_json(path) if path.exists() else {}
    for cell in CELLS:
        if cell.name in args.cells and (args.output / f"{cell.model}_{cell.data}.json").exists():
            result[cell.name] = ranked(cell, args.assets, args.output, args.scorers)
    write_json(path, result)
    write_text(args.output / "table.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
