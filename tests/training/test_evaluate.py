from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from autopeft.errors import Diverged, StoreError, UsageError
from autopeft.tasks.metrics import scaled_nll
from autopeft.testing.toy_task import ToyTask
from autopeft.training.evaluate import evaluate


def test_figures_equal_the_predictions(insert: Callable[..., Any]) -> None:
    inserted, task = insert(), ToyTask(n_outer=40)
    inserted.train_mode(True)
    result = evaluate(inserted.model, task, "outer", "cpu")
    assert inserted.model.training
    with torch.no_grad():
        images, labels = next(iter(task.batches("outer", batch_size=40)))
        logits = inserted.model(images)
    hits = (logits.argmax(1) == labels).numpy()
    assert result.merits.dtype == np.bool_
    assert (result.merits == hits).all()
    assert result.top1 == pytest.approx(hits.mean())
    assert result.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.interval[0] <= result.top1 <= result.interval[1]
    assert result.interval[1] - result.interval[0] < 0.5
    assert dict(result.metrics) == {
        "top1": result.top1,
        "macro_f1": result.macro_f1,
        "ece": result.ece,
        "nll": result.nll,
        "scaled_nll": pytest.approx(scaled_nll(logits, labels), rel=1e-5),
    }
    assert result.split == "outer"


class _Loss(ToyTask):
    """Judges each sample by a loss, of which less is better."""

    def judge(self, model: Any, split: Any) -> tuple[dict[str, float], torch.Tensor]:
        losses = torch.arange(1.0, 17.0, dtype=torch.float64)
        return {"loss": float(losses.mean())}, -losses


def test_a_task_may_judge_its_samples_itself(insert: Callable[..., Any]) -> None:
    result = evaluate(insert().model, _Loss(), "outer", "cpu")
    assert dict(result.metrics) == {"loss": 8.5}
    assert result.merits.tolist() == [-float(i) for i in range(1, 17)]
    assert result.interval[0] < 8.5 < result.interval[1]


def test_not_a_number_is_not_an_accuracy(insert: Callable[..., Any]) -> None:
    inserted = insert()
    inserted.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(Diverged):
        evaluate(inserted.model, ToyTask(), "outer", "cpu")


def test_another_device_is_refused(insert: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="lies on cpu, not on meta"):
        evaluate(insert().model, ToyTask(), "outer", "meta")


def test_the_test_split_is_sealed(insert: Callable[..., Any]) -> None:
    with pytest.raises(StoreError):
        evaluate(insert().model, ToyTask(), "test", "cpu")
