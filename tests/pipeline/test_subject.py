"""The recipe for one subject: mask guidance, prior preservation and the pull towards the pre-trained weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autopeft.config.decode import load_study
from autopeft.config.spaces import load_space
from autopeft.pipeline.knobs import apply_knobs, relevant_space
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.restore import restore
from autopeft.pipeline.trial import run_trial
from autopeft.tasks.denoising import DenoisingTask

RECIPE = Path(__file__).parents[2] / "studies" / "subject"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("make_subject", RECIPE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("subject")
    assert module.make(folder, count=6, steps=2) == 14
    return folder


def opened(data: Path, **settings: Any) -> Prepared:
    few = {"data.spec": str(data), "train.epochs": 3, "device": "cpu", "data.batch_size": 8}
    study = load_study([RECIPE / "study.yaml"], {**few, **settings})
    return prepare(study)


def test_masks_and_priors_weigh_in_the_loss(data: Path) -> None:
    prepared = opened(data, **{"task.prior_weight": 0.5})
    task = prepared.task
    assert isinstance(task, DenoisingTask)
    assert task.classes == ("anything", "subject")
    seen = set()
    for batch in task.batches("inner"):
        assert batch.weight is not None
        for label, weight in zip(batch.labels.tolist(), batch.weight, strict=True):
            seen.add(label)
            # Prior images count a half everywhere; those of the subject one on average, less beside the mask.
            assert float(weight.mean()) == pytest.approx(0.5 if label == 0 else 1.0, rel=1e-5)
            if label == 1:
                assert float(weight.min()) == pytest.approx(0.2 * float(weight.max()), rel=1e-5)
    assert seen == {0, 1}


@pytest.mark.slow
def test_the_pull_keeps_the_model_near_what_it_was(data: Path, tmp_path: Path) -> None:
    prepared = opened(data)
    plan = make_plan(prepared)
    assert 0 < plan.trainable <= prepared.budget.limit
    moved = {}
    for weight in (0.0, 100.0):
        study = apply_knobs(prepared.study, {"regularisers.l2_start.weight": weight})
        result = run_trial(prepared, study, plan, seed=0, folder=tmp_path / str(weight))
        assert result.outcome.status == "done"
        assert {"denoising_loss", "noise_difference_max"} <= set(result.outcome.metrics)
        assert result.adapter is not None
        with prepared.study.backend.insert(
            prepared.model, prepared.catalog, plan, study.methods, head=prepared.head
        ) as inserted:
            restore(inserted, result.adapter)
            before = dict(prepared.model.named_parameters())
            merged = inserted.merged_state()
            moved[weight] = sum(
                float((merged[name] - p.detach()).square().sum())
                for name, p in before.items()
                if name in merged and "class_embedding" not in name
            )
    assert 0 < moved[100.0] < 0.5 * moved[0.0]


def test_the_space_is_of_the_recipe() -> None:
    study = load_study([RECIPE / "study.yaml"], {})
    space = relevant_space(load_space(study.search.space), study)
    assert "regularisers.l2_start.weight" in {knob.path for knob in space}
    defaults = {knob.path: knob.default for knob in space}
    assert apply_knobs(study, defaults).regularisers == study.regularisers
