"""Subsets of SV-DIFF's shifts chosen by (quality, memorisation), beside full fine-tuning, whole methods and chance.

    python studies/memcontrol/run.py

The bundled denoiser is fine-tuned on few digits, four of which are shown 16 times as often as the others, each under a
class of its own, as captions that no other image has: they can be memorised. A search over twelve bits (`GROUPS`) and
the learning rate (multi-objective TPE, seed 0) looks at the outer split alone: denoising loss at fixed noise, and the
noise difference of the planted images. Two subsets are taken from it: the knee of its front, and the best loss among
those that memorise no more than unmasked SV-DIFF at its tuned rate. Every other contender tries learning rates half a
decade apart on the outer split by its loss, until the best is not at an end, two more at most. Then each is trained
with three new seeds and measured on the test split, which is opened once; on inner alone, as in the search: the outer
images would leave the planted ones a third of their share. The control of a subset are three random masks with as many
bits on and the nearest count of parameters, one per seed. Trainings that the ledger beside the result holds are not
repeated, so an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.allocation.mask import Mask
from autopeft.config.decode import load_study
from autopeft.config.study import Study
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.goals import Goals
from autopeft.core.record import Trial
from autopeft.methods.bias import Bias
from autopeft.methods.gamma import Gamma
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.pipeline.contenders import contender
from autopeft.pipeline.effort import Effort
from autopeft.pipeline.events import Event
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.knobs import apply_knobs
from autopeft.pipeline.ledger import Entry, Ledger
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.trials import TrialLoop, open_searcher
from autopeft.store.atomic import write_json
from autopeft.store.paths import RunFolder

HERE = Path(__file__).parent
STEP = 10**0.5
SCALES = (1.0, STEP, STEP**2)
EXTENSIONS = 2
SEEDS = (1, 2, 3)
SAMPLES = 64
QUALITY, MEMORY = "denoising_loss", "noise_difference_mean"
LOOKED_AT = {"type": "joint", "parts": ["denoising_loss", {"type": "noise_difference", "over": "mean"}]}
REPORTED = {
    "type": "joint",
    "parts": [
        *LOOKED_AT["parts"],
        {"type": "fid", "samples": SAMPLES},
        {"type": "kid", "samples": SAMPLES},
        {"type": "amd", "samples": SAMPLES},
        {"type": "amd", "samples": SAMPLES, "rows": "planted"},
        {"type": "amd", "samples": SAMPLES, "space": "pixels", "distance": "l2", "rows": "planted"},
        {"type": "extraction", "samples": SAMPLES, "threshold": 0.3},
    ],
}
COLUMNS = ("fid", "kid", "amd", "amd_planted", "amd_pixels_l2_planted", "extracted", MEMORY, QUALITY)
HEAD_ONLY, FULL, BASE = "head only", "full fine-tuning", "SV-DIFF, unmasked"

_ATTENTION, _REST = ("*.attentions.*",), ("*.resnets.*", "*.downsamplers.*", "*.upsamplers.*")


def _stage(where: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{where}{pattern[1:]}" for pattern in patterns)


GROUPS = {
    "down0": _stage("down_blocks.0", _REST),
    "down1": _stage("down_blocks.1", _REST),
    "down1_attention": _stage("down_blocks.1", _ATTENTION),
    "down2": _stage("down_blocks.2", _REST),
    "down2_attention": _stage("down_blocks.2", _ATTENTION),
    "mid": _stage("mid_block", _REST),
    "mid_attention": _stage("mid_block", _ATTENTION),
    "up0": _stage("up_blocks.0", _REST),
    "up0_attention": _stage("up_blocks.0", _ATTENTION),
    "up1": _stage("up_blocks.1", _REST),
    "up1_attention": _stage("up_blocks.1", _ATTENTION),
    "up2": _stage("up_blocks.2", _REST),
}
"""The bits of a mask: attentions and the rest of each stage; stem, time embedding and end are always kept."""

Contender = tuple[Study, Allocation]


def say(event: Event) -> None:
    print(event.text, flush=True)


def study_of(epochs: int, trials: int) -> Study:
    """The offline task, and SV-DIFF under a bit per block."""
    return load_study(
        [],
        {
            "task": {"type": "diffusion", "draws": 2, "steps": 10},
            "model.spec": "bundled:unet_tiny_fashion",
            "data.spec": "digits?planted=4&repeat=16&own=1",
            "data.max_samples": 500,
            "data.val_frac": 0.2,
            "data.test_frac": 0.4,
            "data.max_inner": 40,
            "data.batch_size": 32,
            "budget": "0.5%",
            "methods": {"svdiff": {"type": "svdiff", "norms": True}},
            "allocator": {"type": "mask", "groups": GROUPS, "outside": True},
            "train.epochs": epochs,
            "train.threads": 1,
            # New classes start as no class; at the usual rate of heads their rows would hardly leave it in 100 steps.
            "train.lr.head": 3e-2,
            "reward": LOOKED_AT,
            "search.front": "pareto",
            "search.space": str(HERE / "space.yaml"),
            "search.trials": trials,
            "device": "cpu",
        },
    )


def with_mask(study: Study, bits: Mapping[str, int]) -> Study:
    return dataclasses.replace(study, allocator=Mask(groups=GROUPS, outside=True, bits=bits))


def whole_methods(prepared: Prepared, study: Study) -> dict[str, Contender]:
    """Full fine-tuning, SV-DIFF and DiffFit everywhere, and LoRA of rank 1 on the projections of every attention."""
    loose = dataclasses.replace(prepared, budget=Budget(prepared.catalog.n_base), _energies={})
    (full,) = contender("full", prepared, study).candidates
    attention = ("*.attentions.*.to_*",)
    difffit = dataclasses.replace(
        study,
        methods={"gamma": Gamma(), "norm": Norm(), "bias": Bias()},
        mergeable=False,
        allocator=Mask(methods={"gamma": attention, "norm": ("*",), "bias": ("*",)}, outside=True),
    )
    lora = dataclasses.replace(
        study, methods={"lora": LoRA()}, allocator=Mask(methods={"lora": attention}, sizes={"lora": 1}, outside=True)
    )
    return {
        FULL: (full.under(study), full.allocation),
        BASE: (study, make_plan(prepared, study)),
        "DiffFit": (difffit, make_plan(loose, difffit)),
        "LoRA, rank 1": (lora, make_plan(loose, lora)),
    }


def searched(runner: Runner, study: Study, run: RunFolder) -> list[Trial]:
    """The trials of the search, or those that an earlier process has run and the rest."""
    effort = Effort(study.train.epochs, study.train.epochs)
    searcher = open_searcher(runner.prepared, study, run.create(), effort)
    TrialLoop(runner, study, searcher, effort, run).until(study.search.trials)
    return [t for t in searcher.finished() if t.outcome.status == "done"]


def chance(prepared: Prepared, study: Study, plan: Allocation, bits: Mapping[str, int]) -> list[Allocation]:
    """Three other masks with as many bits on whose counts are nearest, of 200 drawn."""
    rng, names, on = np.random.default_rng(0), list(bits), sum(bits.values())
    found: dict[str, Allocation] = {}
    for _ in range(200):
        chosen = rng.permutation(len(names))[:on]
        drawn = {name: int(i in chosen) for i, name in enumerate(names)}
        other = make_plan(prepared, with_mask(study, drawn))
        if other.digest != plan.digest:
            found.setdefault(other.digest, other)
    return sorted(found.values(), key=lambda p: (abs(p.trainable - plan.trainable), p.digest))[: len(SEEDS)]


def tuned(runner: Runner, study: Study, plan: Allocation, name: str) -> tuple[Study, dict[str, Any]]:
    """The study with the learning rate of the smallest loss on the outer split, and what every rate gave."""
    tried: dict[float, tuple[float, ...]] = {}

    def attempt(scale: float) -> None:
        one = dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=scale))
        outcome = runner.train(one, plan, label=f"{name} x{scale:.3g}", seed=0, stage="baselines").outcome
        tried[scale] = one.reward.value(outcome) if outcome.status == "done" else (float("inf"), float("inf"))

    for scale in SCALES:
        attempt(scale)
    for _ in range(EXTENSIONS):
        least = min(tried, key=lambda scale: tried[scale][0])
        if least not in (min(tried), max(tried)):
            break
        attempt(least / STEP if least == min(tried) else least * STEP)
    best = min(tried, key=lambda scale: tried[scale][0])
    chosen = dataclasses.replace(study, train=dataclasses.replace(study.train, lr_scale=best))
    outer = {f"{scale:.3g}": [round(v, 4) for v in values] for scale, values in sorted(tried.items())}
    return chosen, {"lr_scale": best, "outer_by_scale": outer}


def tested(runner: Runner, study: Study, plans: Sequence[Allocation], name: str) -> dict[str, list[float]]:
    """What is reported of a contender, one number per seed; the test split must be open. One plan per seed."""
    reported = dataclasses.replace(study, reward=load_study([], {"reward": REPORTED}).reward)
    entries: list[Entry] = [
        runner.train(
            reported, plan, label=f"{name}, seed {seed}", seed=seed, splits=("inner",), measure="test", stage="finish"
        )
        for seed, plan in zip(SEEDS, plans, strict=True)
    ]
    return {c: [round(entry.outcome.metrics[c], 4) for entry in entries] for c in (*COLUMNS, "kid_error")}


def chosen_masks(trials: list[Trial], most: float) -> dict[str, Trial]:
    """The knee of the front, and the best quality that memorises at most so much."""
    names, directions, rewards = (QUALITY, MEMORY), ("minimize", "minimize"), [t.rewards for t in trials]
    knee = trials[Goals(names, directions, "pareto").choose(rewards)]
    epsilon = trials[Goals(names, directions, "epsilon", {MEMORY: most}).choose(rewards)]
    return {"found, knee": knee, "found, epsilon": epsilon}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Search, tune, train with three seeds, measure once."""
    study, ledger = study_of(args.epochs, args.trials), args.output / "ledger"
    prepared = prepare(study, ledger / "run", {"unseal_token": "memcontrol"})
    runner = Runner(prepared, Ledger(ledger), say)
    rows: dict[str, dict[str, Any]] = {}
    final: dict[str, tuple[Study, list[Allocation]]] = {HEAD_ONLY: (study, [Allocation((), prepared.budget)] * 3)}
    rows[HEAD_ONLY] = {"parameters": 0}
    for name, (one, plan) in whole_methods(prepared, study).items():
        best, facts = tuned(runner, one, plan, name)
        final[name] = best, [plan] * len(SEEDS)
        rows[name] = {"parameters": plan.trainable, **facts}
    base = rows[BASE]["outer_by_scale"][f"{rows[BASE]['lr_scale']:.3g}"][1]
    trials = searched(runner, study, RunFolder(ledger / "search"))
    for name, trial in chosen_masks(trials, base).items():
        one = apply_knobs(study, trial.knobs)
        plan = read_plan(ledger / "search" / trial.plan).allocation
        bits = {knob.rpartition(".")[2]: int(v) for knob, v in trial.knobs.items() if ".bits." in knob}
        final[name] = one, [plan] * len(SEEDS)
        on = [bit for bit, value in bits.items() if value]
        rows[name] = {"parameters": plan.trainable, "trial": trial.number, "on": on, "lr": one.train.lr.core}
        rows[name]["outer"] = [round(v, 4) for v in trial.rewards]
        others = chance(prepared, study, plan, bits)
        if not others:
            print(f"{name}: no other mask has as many bits, so there is no control", flush=True)
            continue
        control = name.replace("found", "random, as many as")
        best, facts = tuned(runner, one, others[0], control)
        final[control] = best, [others[i % len(others)] for i in range(len(SEEDS))]
        rows[control] = {"parameters": round(statistics.fmean(p.trainable for p in others)), **facts}
    costs = runner.ledger.passes()

    prepared.task.unseal_test()
    for name, (one, plans) in reversed(final.items()) if args.reverse else final.items():
        rows[name] |= tested(runner, one, plans, name)
    return {
        "settings": {
            "epochs": args.epochs,
            "trials": args.trials,
            "scales": SCALES,
            "seeds": SEEDS,
            "samples": SAMPLES,
            "data": study.data.spec,
            "base_parameters": prepared.catalog.n_base,
        },
        "sizes": dict(prepared.task.sizes),
        "environment": environment_facts(prepared),
        "limit": base,
        "search": [{"trial": t.number, "rewards": [round(v, 4) for v in t.rewards], "spent": t.spent} for t in trials],
        "costs": {stage: round(passes) for stage, passes in costs.items()},
        "full_training": args.epochs * prepared.task.sizes["inner"],
        "contenders": rows,
        "wins": wins(rows),
    }


def wins(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Seeds, of three, in which a subset is better than a contender in a quality and in the noise difference."""
    found = [name for name in rows if name.startswith("found")]
    others = [name for name in rows if not name.startswith("found") and name != HEAD_ONLY]

    def won(one: str, other: str, quality: str) -> int:
        pairs = zip(*(zip(rows[one][c], rows[other][c], strict=True) for c in (quality, MEMORY)), strict=True)
        return sum(all(a < b for a, b in pair) for pair in pairs)

    return {q: {one: {other: won(one, other, q) for other in others} for one in found} for q in ("fid", QUALITY)}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: contenders with the mean and range of three seeds, then wins and costs."""
    settings, sizes = result["settings"], result["sizes"]
    heads = (
        "FID",
        "KID",
        "AMD",
        "AMD, planted",
        "AMD, planted, pixels",
        "extracted",
        "noise difference",
        "denoising loss",
    )
    lines = [
        f"{settings['samples']} images made per model, {sizes['test']} real ones (test); mean and range of "
        f"{len(settings['seeds'])} seeds. AMD: higher is better; all the others: lower.",
        "",
        "| contender | parameters | " + " | ".join(heads) + " |",
        "|" + "---|" * (len(heads) + 2),
    ]
    for name, row in result["contenders"].items():
        cells = [_spread(row[column]) for column in COLUMNS]
        lines.append(f"| {name} | {row['parameters']:,} | " + " | ".join(cells) + " |")
    for quality, label in (("fid", "FID"), (QUALITY, "denoising loss")):
        won = result["wins"][quality]
        others = next(iter(won.values()))
        lines += ["", f"Seeds of three in which a subset has the lower {label} and the lower noise difference:", ""]
        lines += ["| subset | " + " | ".join(others) + " |", "|" + "---|" * (1 + len(others))]
        lines += [f"| {one} | " + " | ".join(map(str, over.values())) + " |" for one, over in won.items()]
    full, costs = result["full_training"], result["costs"]
    text = f"{settings['trials']} trials of the search took {costs.get('search', 0) / full:.1f} full trainings (passes "
    lines += ["", f"{text}over samples), the tuning of all the others {costs.get('baselines', 0) / full:.1f}."]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=64)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--reverse", action="store_true", help="last trainings from the end: for a second process")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    result = measured(args)
    write_json(args.output / "result.json", result)
    (args.output / "table.md").write_text(table(result))


if __name__ == "__main__":
    main()
