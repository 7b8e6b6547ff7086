"""Quality and memorisation as two goals of a search over masks of a denoiser, and what becomes of the mask found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from autopeft.cli.main import app
from autopeft.config.decode import load_study, study_from_dict
from autopeft.core.goals import Goals
from autopeft.core.record import Record, Trial
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.search import run_search
from autopeft.store.paths import RunFolder
from autopeft.testing.tiny_denoiser import tiny_pipeline

pytestmark = pytest.mark.slow

BITS = ("down1_0", "mid0", "up0_0", "up0_1")
RATE = "train.lr.matrix"
GOALS = Goals(("amd", "denoising_loss", "noise_difference_max"), ("maximize", "minimize", "minimize"))
PARTS = [{"type": "amd", "samples": 6}, "denoising_loss", "noise_difference"]


class Found(NamedTuple):
    record: Record
    run: Path
    model: Path
    finish: list[tuple[float, tuple[str, ...], int]]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as found:
        found.setattr("autopeft.pipeline.conclude.deliver", lambda *args, **kwargs: {})
        found.setattr("autopeft.pipeline.conclude.dataflow", lambda *args, **kwargs: None)
        yield found


def searched(root: Path, model: Path, **settings: Any) -> Record:
    space = root / "space.yaml"
    bits = "".join(f"allocator.bits.{name}: {{choices: [0, 1], default: 1}}\n" for name in BITS)
    space.write_text(f"{bits}{RATE}: {{low: 1e-3, high: 1, log: true, default: 1e-2}}\n")
    study = load_study(
        [],
        {
            "task": {"type": "diffusion", "draws": 1, "steps": 2},
            "model.spec": f"diffusers:{model}",
            "data.spec": "digits?planted=2&repeat=2",
            "data.max_samples": 60,
            "budget": "3%",
            "methods": ["lora"],
            "allocator": {"type": "mask", "layout": "unet_attention"},
            "train.epochs": 2,
            "search.trials": 5,
            "search.seeds": 2,
            "search.tries": 1,
            "search.contenders": "head_only",
            "search.space": str(space),
            "device": "cpu",
            **{key.replace("__", "."): value for key, value in settings.items()},
        },
    )
    return run_search(study, RunFolder(root / "run"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Found:
    root = tmp_path_factory.mktemp("front")
    model, train, finish = tiny_pipeline(root / "model"), Runner.train, []

    def seen(self: Runner, study: Any, *args: Any, **given: Any) -> Any:
        if given["stage"] == "finish":
            finish.append((study.train.lr.matrix, given["splits"], given["seed"]))
        return train(self, study, *args, **given)

    patch.setattr(Runner, "train", seen)
    # What is in front is measured on generated images alone: no number of an epoch stands for it.
    record = searched(root, model, reward={"type": "joint", "parts": PARTS})
    return Found(record, root / "run", model, finish)


def ours(record: Record) -> list[Trial]:
    return [t for t in record.trials if t.role != "baseline" and t.rewards]


def test_the_front_of_masks_and_its_knee(found: Found) -> None:
    record, trials = found.record, ours(found.record)
    assert record.search["mode"] == "pareto"
    assert all(t.outcome.status == "done" for t in trials), "nothing is stopped where nothing stands for the goal"
    assert all(t.outcome.trainable <= record.budget["limit"] for t in trials)
    assert len({t.digest for t in trials}) > 2, "one mask alone shows nothing"
    rewards = [t.rewards for t in trials]
    assert record.search["front"] == [trials[i].number for i in GOALS.on_front(rewards)]
    assert record.best == trials[GOALS.choose(rewards)].number
    assert "folder" not in record.model["data_config"]["diffusion"], "a place on this machine is no fact of a model"


def test_mask_and_learning_rate_go_together_into_stage_two(found: Found) -> None:
    record = found.record
    best = next(t for t in record.trials if t.number == record.best)
    if best.role == "default":
        pytest.fail("the default plan won, so that the test shows nothing; take another seed")
    plan = read_plan(found.run / best.plan)
    study = study_from_dict(plan.study)
    bits = {name.rpartition(".")[2]: value for name, value in best.knobs.items() if ".bits." in name}
    assert dict(study.allocator.bits) == bits  # type: ignore[attr-defined]  # it is a mask
    assert study.train.lr.matrix == best.knobs[RATE] != 5e-3
    mine = [(rate, splits, seed) for rate, splits, seed in found.finish if rate == best.knobs[RATE]]
    assert mine == [(best.knobs[RATE], ("inner", "outer"), seed) for seed in (0, 1)]
    assert [o.split for o in record.contenders[0].outcomes] == ["test", "test"]
    assert all(set(GOALS.names) <= set(o.metrics) for o in record.contenders[0].outcomes)


def test_a_mask_is_trained_on_other_data_by_one_command(found: Found, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "other" / name / f"{i}.png")
    best = next(t for t in found.record.trials if t.number == found.record.best)
    path = found.run / best.plan
    flags = ["--plan", path, "--data", tmp_path / "other", "-o", tmp_path / "out", "train.epochs=1", "--json"]
    result = CliRunner().invoke(app, ["train", *map(str, flags)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    outcome = json.loads(result.stdout)["outcome"]
    assert set(GOALS.names) <= set(outcome["metrics"])
    before, after = read_plan(path), read_plan(tmp_path / "out" / "plan.json")
    assert after.allocation.digest == before.allocation.digest
    assert after.data_hash != before.data_hash
    assert after.study["train"]["lr"] == before.study["train"]["lr"]
    assert (after.study["data"]["spec"], after.study["train"]["epochs"]) == (str(tmp_path / "other"), 1)
    refused = CliRunner().invoke(app, ["train"])
    assert refused.exit_code != 0


def test_the_best_quality_within_a_limit_on_memorisation(found: Found, tmp_path: Path) -> None:
    values = sorted(t.rewards[2] for t in ours(found.record))
    limit = values[len(values) // 2]
    reward = {"type": "joint", "parts": ["denoising_loss", "noise_difference"]}
    record = searched(tmp_path, found.model, reward=reward, search__limits={"noise_difference_max": limit})
    assert record.search["mode"] == "epsilon"
    kept = [t for t in ours(record) if t.rewards[1] <= limit]
    best = next(t for t in record.trials if t.number == record.best)
    assert 0 < len(kept) < len(ours(record)), "the limit decides nothing, so that the test shows nothing"
    assert best in kept
    assert best.rewards[0] == min(t.rewards[0] for t in kept)
