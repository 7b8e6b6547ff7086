"""Where the best learning rate of a family lies as width, rank and depth change, without and with the rules.

    python studies/lr_rules/run.py --data FOLDER --work FOLDER

`--data` holds the four idx files of Fashion-MNIST (see ../bundled_model/pretrain.py): vision transformers that differ
in width or depth alone are pre-trained on it by the recipe of the bundled model, shortened, and kept in `--work`. Each
is then adapted to digits by one family of methods on every matrix of its blocks, at learning rates an octave apart.
Every training is written to `result.json` beside this file as it ends, and is not repeated.

`--vit-s FILE --pictures FOLDER` (see ../assets) adds the check on a real model: core matrices of one rank on every
matrix at 0.1 %, at the default learning rate times powers of two.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from autopeft.allocation.indices import attach_indices
from autopeft.backends.native import Native
from autopeft.config.study import DataSettings, Study
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.scores import Scores
from autopeft.core.site import Site
from autopeft.errors import TrainingFailed
from autopeft.methods.bias import Bias
from autopeft.methods.block_adapter import BlockAdapter
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.sparse import Sparse
from autopeft.methods.tokens import Tokens
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.trial import run_trial
from autopeft.scoring.gradient import Gradient
from autopeft.store.atomic import write_json, write_text
from autopeft.tasks._labelled import Batch, LabelledTask, Row
from autopeft.tasks.classification import Classification
from autopeft.training.evaluate import evaluate
from autopeft.training.loop import fit
from autopeft.training.probe import ridge_probe
from autopeft.training.rates import REFERENCE_WIDTH, head_factor, rate_factor, sizes_of
from autopeft.training.settings import RateRule, TrainSettings

HERE = Path(__file__).parent
RECIPE = HERE.parent / "bundled_model" / "pretrain.py"
PRETRAIN_IMAGES = 30_000
PRETRAIN_EPOCHS = 2
TRAINED, MEASURED, BATCH = 1920, 1000, 32
"""Images of the target, each trained on once; images that the outcome is measured on."""
SEEDS = (0, 1)
FAILED = 99.0
FARTHEST = 8
"""Octaves from the default beyond which no learning rate is tried."""


@dataclass(frozen=True)
class Net:
    """A vision transformer of one width and depth; heads are 32 wide as in the bundled model."""

    width: int
    depth: int

    def __str__(self) -> str:
        return f"w{self.width}-d{self.depth}"

    @property
    def kwargs(self) -> dict[str, int]:
        return {"embed_dim": self.width, "depth": self.depth, "num_heads": self.width // 32}


@dataclass(frozen=True)
class Arm:
    """One method of one size on every site that takes it, under one setting of the rules.

    Attributes:
        name: what the table calls it.
        method: the method; None trains the head alone.
        size: the method's size; of `entries`, the share of a weight that is trained.
        rules: fields of `TrainSettings` that differ from the plain ones.
    """

    name: str
    method: Method | None
    size: float = 1
    rules: Mapping[str, Any] = field(default_factory=dict, hash=False)
    roles: tuple[str, ...] = ()
    """Roles of the sites; empty for all but the stem."""

    def takes(self, site: Site) -> bool:
        if self.method is None or not self.method.slots(site) or self.size_on(site) > self.method.sizes(site)[-1]:
            return False
        return site.role in self.roles if self.roles else site.role != "stem"

    def size_on(self, site: Site) -> int:
        return max(1, round(self.size * site.n_weight)) if isinstance(self.method, Sparse) else int(self.size)


PLAIN = (
    *(Arm(f"core r{r}", Core(), r) for r in (1, 4, 16)),
    *(Arm(f"lora r{r}", LoRA(), r) for r in (1, 4, 16)),
    *(Arm(f"sparse 1/{n}", Sparse(), 1 / n) for n in (256, 16)),
    Arm("bias", Bias()),
    Arm("adapter r4", BlockAdapter(), 4),
    Arm("tokens", Tokens()),
    Arm("head", None),
)
"""Without rules. `spectral` and `count` change the rates of an arm by one factor, so that no training is repeated."""

RULED = (
    Arm("lora r4, width", LoRA(), 4, {"rate_rule": "width"}),
    Arm("adapter r4, width", BlockAdapter(), 4, {"rate_rule": "width"}),
    *(Arm(f"lora r{r}, sqrt", LoRA(scaling="sqrt"), r) for r in (4, 16)),
    Arm("lora r4, plus 16", LoRA(), 4, {"lora_plus": 16.0}),
)

DECAYED = tuple(Arm(f"lora r4, decay {decay:g}", LoRA(), 4, {"weight_decay": decay}) for decay in (0.1, 1.0, 10.0))
"""At the best learning rate of plain LoRA."""

WIDE = ("core r4", "core r16", "lora r4", "lora r16", "sparse 1/256", "lora r4, width")
"""What the widest net is trained on."""

DEEP = ("core r4", "core r16", "lora r4")
"""What the deepest net is trained on."""

NETS = (Net(32, 3), Net(64, 3), Net(128, 3), Net(256, 3), Net(64, 9))
SHIFTS: tuple[RateRule, ...] = ("width", "spectral", "count")
BUNDLED, REAL = "bundled", "vit-s-14"
REAL_EPOCHS = 3
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
REAL_ARMS = {
    Arm("core r20", Core(), 20): (-5, -4, -3, -2, -1, 0),
    Arm("core r7", Core(), 7): (-3, -2, -1, 0),
    Arm("lora qkv r1", LoRA(), 1, roles=("attn.qkv",)): (-3, -2, -1, 0),
    Arm("bias", Bias()): (-3, -2, -1, 0),
}
"""On ViT-S/14: core matrices of the rank that 0.1 % buys everywhere, and of the bundled model's; octaves."""


def recipe() -> ModuleType:
    """The script that made the bundled model."""
    spec = importlib.util.spec_from_file_location("pretrain", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretrained(net: Net, data: Path, work: Path) -> tuple[Path, float]:
    """Weights of a net pre-trained for a short while, and its accuracy on the test images of the source."""
    path, facts = work / f"{net}.safetensors", work / f"{net}.json"
    if not path.exists():
        script = recipe()
        script.MODEL_ARGS.update(net.kwargs)
        script.NAME = str(net)
        args = argparse.Namespace(seed=0, epochs=PRETRAIN_EPOCHS, batch_size=128, lr=1e-3, weight_decay=0.05)
        images, labels = script.read_split(data, "train")
        model = script.train(images[:PRETRAIN_IMAGES], labels[:PRETRAIN_IMAGES], args)
        test = script.read_split(data, "t10k")
        script.write(model, work, script.accuracy(model, test[0][:2000], test[1][:2000]), args)
    return path, json.loads(facts.read_text())["training"]["test_accuracy"]


class Turned(LabelledTask):
    """Fashion-MNIST turned by 90 degrees: images that the pre-training has not seen, in a pose it does not know."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        cut = {"inner": slice(0, TRAINED), "outer": slice(TRAINED, TRAINED + MEASURED)}
        rows = {split: labels[where].tolist() for split, where in cut.items()}
        super().__init__(tuple(map(str, range(10))), {**rows, "test": list(range(10))}, BATCH)
        turned = images.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
        self._images = {split: turned[where] for split, where in cut.items()}

    @property
    def data_hash(self) -> str:
        return hashlib.sha256(self._images["inner"].contiguous().numpy().tobytes()).hexdigest()[:16]

    def walk(self, chunks: Sequence[Sequence[Row]], generator: torch.Generator | None) -> Iterator[Batch]:
        for rows in chunks:
            yield (
                torch.stack([self._images[split][i] for split, i in rows]),
                torch.stack([self._labels[split][i] for split, i in rows]),
            )


class Bench:
    """Trains arms on one model, and remembers what came out."""

    def __init__(
        self, name: str, spec: ModelSpec, task: LabelledTask | Path, results: dict[str, Any], save: Callable[[], None]
    ) -> None:
        self.name, self.save = name, save
        self.epochs = 1
        self.seeds = SEEDS
        self.shifts: dict[str, dict[str, float]] = results.setdefault("shifts", {}).setdefault(name, {})
        self.points: dict[str, dict[str, float]] = results.setdefault("points", {}).setdefault(name, {})
        loaded = load_model(spec)
        if isinstance(task, Path):
            cut = {"val_frac": 0.5, "test_frac": 0.1, "batch_size": BATCH}
            task = Classification().open(str(task), loaded.data_config, None, 0, cut)
            self.epochs = REAL_EPOCHS
        self.task = task
        self.catalog = loaded.reset_head(len(task.classes), 0)
        self.model = loaded.model
        self.head = ridge_probe(self.model, self.catalog, task, device="cpu").state
        for key, tensor in self.model.named_parameters():
            if key in self.head:
                tensor.data.copy_(self.head[key])
        self._scores: Scores | None = None
        self._plans: dict[str, Allocation] = {}

    def plan(self, arm: Arm) -> Allocation:
        """The arm on every site that takes its size, but the stem."""
        if arm.name not in self._plans:
            options = []
            for site in filter(arm.takes, self.catalog.candidates("whole")):
                assert arm.method is not None
                places = tuple(sorted(self.catalog.places(site, arm.method.slots(site))))
                cost = arm.method.cost(site, arm.size_on(site))
                options.append(Option(site.name, "it", arm.size_on(site), cost, 0.0, places))
            allocation = Allocation(tuple(options), Budget(10**9))
            if isinstance(arm.method, Sparse):
                self._scores = self._scores or Gradient(max_samples=256).score(self.model, self.catalog, self.task)
                allocation = attach_indices(allocation, {"it": arm.method}, self._scores)
            self._plans[arm.name] = allocation
        return self._plans[arm.name]

    def at(self, arm: Arm, octave: float) -> float:
        """Likelihood loss on the outer split, mean over seeds, at 2^octave times the default learning rate."""
        return sum(self._train(arm, octave, seed)["nll"] for seed in self.seeds) / len(self.seeds)

    def shift(self, arm: Arm) -> dict[str, float]:
        """Octaves by which each rule changes the arm's learning rate: the mean over its scalars."""
        if arm.method is None:
            weight = next(tensor for tensor in self.head.values() if tensor.ndim == 2)
            return {"width": round(math.log2(head_factor("width", weight)), 3)}
        methods = {"it": arm.method}
        with Native().insert(self.model, self.catalog, self.plan(arm), methods, 0, self.head) as inserted:
            sizes = sizes_of(inserted, methods)
            parts = [
                (p.numel(), sizes[id(p)]) for part in inserted.named_adapters().values() for p in part.parameters()
            ]
        total = sum(n for n, _ in parts)
        return {
            rule: round(sum(n * math.log2(rate_factor(rule, known)) for n, known in parts) / total, 3)
            for rule in SHIFTS
        }

    def _train(self, arm: Arm, octave: float, seed: int) -> dict[str, float]:
        key = f"{arm.name} | {octave:+g} | {seed}"
        if key not in self.points:
            settings = TrainSettings(epochs=self.epochs, threads=1, **{"rate_rule": "none", **arm.rules})
            if arm.method is None:
                rates = dataclasses.replace(settings.lr, head=settings.lr.head * 2.0**octave)
                settings = dataclasses.replace(settings, lr=rates)
            else:
                settings = dataclasses.replace(settings, lr_scale=2.0**octave)
            methods = {} if arm.method is None else {"it": arm.method}
            started = time.process_time()
            row = {"nll": FAILED, "top1": 0.0, "loss": FAILED}
            with Native().insert(self.model, self.catalog, self.plan(arm), methods, seed, self.head) as inserted:
                try:
                    done = fit(inserted, self.task, settings, methods=methods, seed=seed, device="cpu", watch=None)
                    metrics = evaluate(self.model, self.task, "outer", "cpu").metrics
                    row = {"nll": metrics["nll"], "top1": metrics["top1"], "loss": done.losses[-1]}
                except TrainingFailed as error:
                    print(error, flush=True)
            row["seconds"] = time.process_time() - started
            self.points[key] = {name: round(value, 4) for name, value in row.items()}
            self.save()
            print(f"{self.name} {key}: {self.points[key]}", flush=True)
        return self.points[key]

    def optimum(self, arm: Arm, start: int = 0) -> float:
        """Octaves from the default to the learning rate of least outer likelihood loss.

        Octaves are added until the best has two on either side; a parabola through the best and its neighbours says
        where between them the optimum lies. Where training fails counts as a high loss.
        """
        low, high = start - 1, start + 1
        while True:
            values = {o: self.at(arm, o) for o in range(low, high + 1)}
            best = min(values, key=lambda o: (values[o], abs(o)))
            if best - low < 2 and low > -FARTHEST:
                low -= 1
            elif high - best < 2 and high < FARTHEST:
                high += 1
            else:
                break
        return vertex(values, best)


def vertex(values: Mapping[int, float], best: int) -> float:
    """Where the parabola through the best point and its neighbours has its minimum; the best point at an end."""
    if best - 1 not in values or best + 1 not in values:
        return float(best)
    left, middle, right = (values[best + i] for i in (-1, 0, 1))
    curvature = left - 2 * middle + right
    return best + (0.5 * (left - right) / curvature if curvature > 0 else 0.0)


def default_plans(name: str, study: Study, results: dict[str, Any], save: Callable[[], None]) -> None:
    """The plan that a study without settings buys, and that of LoRA alone, without and with the default rule."""
    rows = results.setdefault("default_plans", {}).setdefault(name, {})
    seeds = (0, 1, 2) if name == BUNDLED else (0,)
    names = ("default plan", "LoRA alone")
    wanted = [f"{plan} | {rule} | {seed}" for plan in names for rule in ("none", "spectral") for seed in seeds]
    if all(key in rows for key in wanted):
        return
    prepared = prepare(study)
    lora = dataclasses.replace(study, methods={"lora": LoRA()})
    studies = {"default plan": study, "LoRA alone": lora}
    plans = {plan: make_plan(prepared, one) for plan, one in studies.items()}
    for key in wanted:
        plan, rule, seed = key.split(" | ")
        if key not in rows:
            train = dataclasses.replace(study.train, rate_rule=rule, threads=1)
            trained = dataclasses.replace(studies[plan], train=train)
            outcome = run_trial(prepared, trained, plans[plan], seed=int(seed), folder=None).outcome
            rows[key] = {metric: round(outcome.metrics[metric], 4) for metric in ("nll", "top1")}
            rows[key]["seconds"] = round(outcome.seconds, 1)
            save()
            print(name, key, rows[key], flush=True)


FAMILIES = {
    "core": ("core r1", "core r4", "core r16"),
    "LoRA": ("lora r1", "lora r4", "lora r16"),
    "sparse": ("sparse 1/256", "sparse 1/16"),
    "tokens": ("tokens",),
    "head": ("head",),
}
"""Arms by family, in the order of their size. Bias and block adapters gain nothing here, so they have no optimum."""


def spread(values: Iterable[float]) -> float:
    """Octaves between the largest and the smallest."""
    held = list(values)
    return max(held) - min(held)


def drifts(results: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """Family, direction, and rule to octaves that the optimum drifts: the mean over the other direction."""
    nets = [str(net) for net in NETS]
    optima, shifts = results["optima"], results["shifts"]
    rows = []
    for family, arms in FAMILIES.items():
        directions = {"all": [[(net, arm) for net in nets for arm in arms]]}
        directions["width"] = [[(net, arm) for net in nets if net.endswith("d3")] for arm in arms]
        directions["size"] = [[(net, arm) for arm in arms] for net in nets]
        for direction, lines in directions.items():
            found: dict[str, float] = {}
            for rule in ("none", *SHIFTS):
                held = [
                    [optima[n][a] - (shifts[n].get(a, {}).get(rule, 0.0)) for n, a in line if a in optima.get(n, {})]
                    for line in lines
                ]
                if rule == "width" and family == "LoRA":
                    # A and B move apart, so the arm is trained again; the others of the family are not.
                    continue
                spreads = [spread(line) for line in held if len(line) > 1]
                if spreads:
                    found[rule] = sum(spreads) / len(spreads)
            if found:
                rows.append((family, direction, found))
    return rows


def write_tables(results: Mapping[str, Any]) -> None:
    """Put the tables between the marks in the README."""
    nets = [*map(str, NETS), REAL]
    lines = [f"| arm | {' | '.join(nets)} |", f"|---{'|---:' * len(nets)}|"]
    names = dict.fromkeys(arm for net in nets for arm in results["optima"].get(net, {}))
    for arm in names:
        values = [results["optima"].get(net, {}).get(arm) for net in nets]
        lines.append(f"| {arm} | {' | '.join('' if v is None else f'{v:+.1f}' for v in values)} |")
    rules = ("none", *SHIFTS)
    lines += [
        "",
        f"| drift of the optimum in octaves | over | {' | '.join(rules)} |",
        f"|---|---{'|---:' * len(rules)}|",
    ]
    for family, direction, found in drifts(results):
        cells = " | ".join(f"{found[rule]:.1f}" if rule in found else "" for rule in rules)
        lines.append(f"| {family} | {direction} | {cells} |")
    plans = results.get("default_plans", {})
    lines += ["", "| model | plan | rule | accuracy | loss |", "|---|---|---|---:|---:|"]
    for model, rows in plans.items():
        grouped: dict[tuple[str, str], list[dict[str, float]]] = {}
        for key, row in rows.items():
            plan, rule, _ = key.split(" | ")
            grouped.setdefault((plan, rule), []).append(row)
        for (plan, rule), held in grouped.items():
            top1, nll = (sum(row[metric] for row in held) / len(held) for metric in ("top1", "nll"))
            lines.append(f"| {model} | {plan} | {rule} | {top1:.3f} | {nll:.3f} |")
    readme = HERE / "README.md"
    before, mark, rest = readme.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise SystemExit(f"{readme} lacks the marks {' and '.join(MARKS)}")
    write_text(readme, f"{before}{mark}\n" + "\n".join(lines) + f"\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vit-s", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--work", type=Path, default=Path("lr_rules_work"))
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    images, labels = recipe().read_split(args.data, "train")
    task = Turned(images[PRETRAIN_IMAGES:], labels[PRETRAIN_IMAGES:])

    def save() -> None:
        write_json(args.output, results)

    starts: dict[str, int] = {}
    for net in NETS:
        path, accuracy = pretrained(net, args.data, args.work)
        results.setdefault("sources", {})[str(net)] = accuracy
        model = ModelSpec("bundled:vit_tiny_fashion", pretrained_path=str(path), kwargs=net.kwargs)
        bench = Bench(str(net), model, task, results, save)
        bench.seeds = SEEDS if net.width < 256 and net.depth == 3 else SEEDS[:1]
        chosen = WIDE if net.width == 256 else DEEP if net.depth > 3 else None
        optima = results.setdefault("optima", {}).setdefault(str(net), {})
        for arm in (*PLAIN, *RULED):
            if chosen is not None and arm.name not in chosen:
                continue
            if arm.size == 16 and net.width == 32 and isinstance(arm.method, LoRA):
                continue  # larger than the weight
            if "rate_rule" in arm.rules and net.width == REFERENCE_WIDTH:
                optima[arm.name] = optima[arm.name.partition(",")[0]]
                continue
            optima[arm.name] = round(bench.optimum(arm, starts.get(arm.name, 0)), 2)
            starts[arm.name] = round(optima[arm.name])
            if arm in PLAIN:
                bench.shifts[arm.name] = bench.shift(arm)
        if chosen is None:
            decays = results.setdefault("decay", {}).setdefault(str(net), {})
            for arm in DECAYED:
                decays[arm.name] = round(bench.at(arm, round(optima["lora r4"])), 4)
        save()
    if args.vit_s is not None and args.pictures is not None:
        spec = ModelSpec("vit_small_patch14_dinov2", img_size=70, pretrained_path=str(args.vit_s))
        bench = Bench(REAL, spec, args.pictures, results, save)
        bench.seeds = SEEDS[:1]
        for arm, octaves in REAL_ARMS.items():
            values = {octave: bench.at(arm, octave) for octave in octaves}
            bench.shifts[arm.name] = bench.shift(arm)
            best = min(values, key=lambda o: values[o])
            results["optima"].setdefault(REAL, {})[arm.name] = round(vertex(values, best), 2)
        save()
    default_plans(BUNDLED, Study(), results, save)
    if args.vit_s is not None and args.pictures is not None:
        data = DataSettings(spec=str(args.pictures), val_frac=0.5, test_frac=0.1)
        real = Study(model=spec, data=data, train=dataclasses.replace(Study().train, epochs=REAL_EPOCHS))
        default_plans(REAL, real, results, save)
    write_tables(results)


if __name__ == "__main__":
    main()
