"""A search on a denoiser, from the study to the exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopeft.config.decode import load_study
from autopeft.pipeline.evaluation import evaluate_export
from autopeft.pipeline.search import run_search
from autopeft.store.paths import RunFolder
from autopeft.testing.tiny_denoiser import tiny_pipeline

SETTINGS = {
    "task": {"type": "diffusion", "draws": 1, "steps": 2},
    "budget": "1%",
    "data.spec": "digits?planted=2&repeat=2",
    "data.max_samples": 60,
    "train.epochs": 1,
    "search.trials": 1,
    "search.seeds": 1,
    "search.tries": 1,
    "methods": ["lora", "bias"],
    "device": "cpu",
}


@pytest.mark.slow
@pytest.mark.parametrize("labels", [11, None])
def test_a_search_runs_to_a_record_and_continues(tmp_path: Path, labels: int | None) -> None:
    """Also on a model that is not told a class, and so has no head."""
    folder = tiny_pipeline(tmp_path / "model", labels=labels)
    study = load_study([], {**SETTINGS, "model.spec": f"diffusers:{folder}"})
    record = run_search(study, RunFolder(tmp_path / "run"))
    assert record.model["n_head"] == (352 if labels else 0)
    assert ("head only" in {t.name for t in record.trials}) == (labels is not None)
    assert all(t.outcome.trainable <= record.budget["limit"] for t in record.trials)
    done = [t for t in record.trials if t.role in ("trial", "default") and t.outcome.status == "done"]
    best = min(done, key=lambda t: t.outcome.metrics["denoising_loss"])
    assert record.best == best.number, "less of the loss is better"
    winner = record.contenders[0].outcomes[0].metrics["denoising_loss"]
    for other in record.contenders[1:]:
        assert other.gain == pytest.approx(other.outcomes[0].metrics["denoising_loss"] - winner)
        assert other.interval[0] <= other.gain <= other.interval[1]
    assert "native" in record.exports
    again = run_search(study, RunFolder(tmp_path / "run"))
    assert [c.outcomes[0].metrics for c in again.contenders] == [c.outcomes[0].metrics for c in record.contenders]
    found = evaluate_export(tmp_path / "run" / "exports" / "native", {}, "test")
    assert found["metrics"]["denoising_loss"] == pytest.approx(winner, rel=1e-5)
    assert found["interval"][0] < winner < found["interval"][1]
