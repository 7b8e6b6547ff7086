"""By which number should candidates be chosen after a short training?

    python studies/selection/run.py --assets ASSETS --output studies/selection

On the bundled ViT at 0.1 %: the default plan and cores everywhere at four learning rates each, and five random mixes
and LoRA at the usual one, are trained for one epoch, for a third of the epochs and, with two seeds, for all of them. A
thousand pictures per task: 400 to train on, 400 to look at; the test split stays sealed. The 400 are halved at random
two hundred times: by the first half a candidate is chosen, by each rule in turn, and on the second half its full
trainings say what the choice was worth. Trainings are kept in `runs/` and not repeated. Writes `result.json` and
`table.md`.

- `top1`: accuracy, ties to the lower loss, then to the earlier candidate.
- `nll`: mean negative log-likelihood.
- `scaled nll`: the same after the one temperature that makes it least on these very pictures.
- `usual rate`: the default plan as it is shipped, nothing chosen.
- `chance`: the mean over all candidates.
- `in full`: by a whole training with one seed; what the choice is worth is seen on the other seed's, and the other way
  round.
- `a third, then in full`: by `scaled nll` after a third; then the same plan half a decade up, where it is among the
  candidates, is held against it, both trained in full, as above.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autopeft.config.study import DataSettings, Study
from autopeft.core.allocation import Allocation
from autopeft.core.temperature import temperature_of
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.contenders import contender
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.store.atomic import write_json, write_text
from autopeft.training.loop import fit
from autopeft.training.threads import thread_count

DATA = ("digits", "animals", "cifar10")
EPOCHS = 12
SHORT = {"one epoch": 1, "a third": 4}
LONGEST = "a third"
SEEDS: tuple[int, ...] = (0, 1)
RATES = tuple((10**0.5) ** i for i in (-2, -1, 0, 1))
HALVINGS = 200


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan at a learning rate."""

    name: str
    study: Study
    allocation: Allocation
    scale: float


def study_of(data: str, assets: Path) -> Study:
    base = Study()
    return dataclasses.replace(
        base,
        model=ModelSpec("bundled:vit_tiny_fashion"),
        data=DataSettings(
            data if data == "digits" else str(assets / data), max_samples=1000, val_frac=0.4, test_frac=0.2
        ),
        budget="0.1%",
        train=dataclasses.replace(base.train, epochs=EPOCHS, threads=1),
    )


def candidates(prepared: Prepared, study: Study) -> list[Candidate]:
    plans = [("default plan", study, make_plan(prepared, study), RATES)]
    for name, rates, most in (("uniform_core", RATES, 1), ("uniform_lora", (1.0,), 1), ("random_mix", (1.0,), 5)):
        group = contender(name, prepared, study)
        plans += [(c.name, c.under(study), c.allocation, rates) for c in group.candidates[:most]]
    return [Candidate(f"{name} x{rate:.3g}", own, plan, rate) for name, own, plan, rates in plans for rate in rates]


def logits(prepared: Prepared, candidate: Candidate, epochs: int, seed: int, folder: Path) -> np.ndarray:
    """Logits on the outer split after a training with a schedule of its own, (pictures, classes)."""
    facts = (prepared.task.data_hash, prepared.origin.head, candidate.allocation.digest, candidate.scale, epochs, seed)
    path = folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npy"
    if path.exists():
        kept: np.ndarray = np.load(path)
        return kept
    study = candidate.study
    train = dataclasses.replace(study.train, epochs=epochs, lr_scale=candidate.scale)
    with (
        thread_count(prepared.threads),
        study.backend.insert(
            prepared.model, prepared.catalog, candidate.allocation, study.methods, seed=seed, head=prepared.head
        ) as inserted,
    ):
        fit(inserted, prepared.task, train, methods=study.methods, seed=seed, device=prepared.device, watch=None)
        found: np.ndarray = prepared.task.predict(inserted.model, "outer")[0].numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, found)
    return found


def top1(found: np.ndarray, labels: np.ndarray) -> float:
    return float((found.argmax(1) == labels).mean())


def nll(found: np.ndarray, labels: np.ndarray) -> float:
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(found).double(), torch.from_numpy(labels)))


def scaled_nll(found: np.ndarray, labels: np.ndarray) -> float:
    return temperature_of(torch.from_numpy(found).double(), torch.from_numpy(labels))[1]


Criterion = Callable[[np.ndarray, np.ndarray], tuple[float, ...]]

CRITERIA: Mapping[str, Criterion] = {
    "top1": lambda found, labels: (top1(found, labels), -nll(found, labels)),
    "nll": lambda found, labels: (-nll(found, labels),),
    "scaled nll": lambda found, labels: (-scaled_nll(found, labels),),
}


def choices(
    short: Mapping[str, np.ndarray], full: np.ndarray, labels: np.ndarray, usual: int, larger: Mapping[int, int]
) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """By each rule, which candidate is taken, and the seeds whose full trainings say what that was worth.

    Args:
        short: length of the short trainings to logits, (candidates, pictures, classes).
        full: logits of the full trainings, (candidates, seeds, pictures, classes).
        labels: classes, (pictures,).
        usual: position of the default plan at the usual rate.
        larger: position of a candidate to that of the same plan half a decade up.
    """

    def best(found: np.ndarray, criterion: str, among: Sequence[int]) -> int:
        values = {i: CRITERIA[criterion](found[i], labels) for i in among}
        return max(among, key=lambda i: (values[i], -i))

    every = range(len(full))
    taken: dict[str, list[tuple[int, tuple[int, ...]]]] = {"usual rate": [(usual, SEEDS)]}
    taken |= {f"{name}, {length}": [(best(x, name, every), SEEDS)] for length, x in short.items() for name in CRITERIA}
    for name in ("top1", "scaled nll"):
        taken[f"{name}, in full"] = [(best(full[:, seed], name, every), (1 - seed,)) for seed in SEEDS]
    first = best(short[LONGEST], "scaled nll", every)
    pair = [first, larger.get(first, first)]
    taken["a third, then in full"] = [(best(full[:, seed], "scaled nll", pair), (1 - seed,)) for seed in SEEDS]
    return taken


def judged(
    short: Mapping[str, np.ndarray], full: np.ndarray, labels: np.ndarray, usual: int, larger: Mapping[int, int]
) -> dict[str, Any]:
    """What the choices are worth: accuracy and loss of the full trainings on pictures that chose nothing."""
    rng = np.random.default_rng(0)
    worth: dict[str, list[np.ndarray]] = {}
    picked: dict[str, np.ndarray] = {}
    for _ in range(HALVINGS):
        see, judge = np.array_split(rng.permutation(len(labels)), 2)
        accuracy = (full[:, :, judge].argmax(-1) == labels[judge]).mean(2)
        loss = np.array([[scaled_nll(run[judge], labels[judge]) for run in runs] for runs in full])
        seen = {length: found[:, see] for length, found in short.items()}
        for name, rows in choices(seen, full[:, :, see], labels[see], usual, larger).items():
            for chosen, seeds in rows:
                worth.setdefault(name, []).extend(np.array([accuracy[chosen, s], loss[chosen, s]]) for s in seeds)
                picked.setdefault(name, np.zeros(len(full), int))[chosen] += len(seeds)
        worth.setdefault("chance", []).append(np.array([accuracy.mean(), loss.mean()]))
    return {
        name: {
            "top1": float(np.mean(rows, axis=0)[0]),
            "scaled_nll": float(np.mean(rows, axis=0)[1]),
            "picked": picked[name].tolist() if name in picked else [],
        }
        for name, rows in worth.items()
    }


def run(data: str, assets: Path, output: Path) -> dict[str, Any]:
    study = study_of(data, assets)
    prepared = prepare(study)
    found = candidates(prepared, study)
    folder = output / "runs"
    short: dict[str, list[np.ndarray]] = {name: [] for name in SHORT}
    full = []
    for candidate in found:
        for name, epochs in SHORT.items():
            short[name].append(logits(prepared, candidate, epochs, 0, folder))
        full.append([logits(prepared, candidate, EPOCHS, seed, folder) for seed in SEEDS])
        print(data, candidate.name, flush=True)
    labels = np.array([int(label) for batch in prepared.task.batches("outer") for label in batch[1]])
    usual = next(i for i, c in enumerate(found) if c.name == "default plan x1")
    places = {(c.allocation.digest, round(np.log10(c.scale) * 2)): i for i, c in enumerate(found)}
    larger = {i: places[d, s + 1] for (d, s), i in places.items() if (d, s + 1) in places}
    rows = []
    for i, candidate in enumerate(found):
        lengths = {name: [own[i]] for name, own in short.items()} | {"full": full[i]}
        rows.append(
            {
                "name": candidate.name,
                "spent": candidate.allocation.spent,
                **{
                    name: {
                        "top1": [top1(x, labels) for x in own],
                        "nll": [round(nll(x, labels), 5) for x in own],
                        "scaled_nll": [round(scaled_nll(x, labels), 5) for x in own],
                    }
                    for name, own in lengths.items()
                },
            }
        )
    return {
        "sizes": dict(prepared.task.sizes),
        "limit": prepared.budget.limit,
        "candidates": rows,
        "chosen by": judged({n: np.stack(own) for n, own in short.items()}, np.array(full), labels, usual, larger),
        "environment": environment_facts(prepared),
    }


def table(result: Mapping[str, Any]) -> str:
    tasks = list(result)
    lines = [f"| chosen by | {' | '.join(tasks)} | mean |", "|" + "---|" * (len(tasks) + 2)]
    names = list(result[tasks[0]]["chosen by"])
    for name in names:
        rows = [result[task]["chosen by"][name] for task in tasks]
        texts = [f"{100 * r['top1']:.1f}, {r['scaled_nll']:.3f}" for r in rows]
        mean = f"{100 * np.mean([r['top1'] for r in rows]):.1f}, {np.mean([r['scaled_nll'] for r in rows]):.3f}"
        lines.append(f"| {name} | {' | '.join(texts)} | {mean} |")
    return (
        "Accuracy in per cent and rescaled negative log-likelihood of the full trainings of what was chosen, on "
        "pictures that\nchose nothing; mean over random halves and two seeds.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    args = parser.parse_args()
    result = {}
    for data in args.data:
        result[data] = run(data, args.assets, args.output)
        write_json(args.output / "result.json", result)
        write_text(args.output / "table.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
