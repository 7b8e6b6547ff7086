from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from autopeft.core.contracts import Task, TaskSpec
from autopeft.tasks.classification import Classification
from autopeft.testing.broken_tasks import BROKEN
from autopeft.testing.task_laws import TaskLaws
from autopeft.testing.toy_task import ToyTask

LAWS = sorted(name for name in vars(TaskLaws) if name.startswith("test_"))
CONFIG = {
    "input_size": (3, 8, 8),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


class TestToyTask(TaskLaws):
    def open(self, folder: Path) -> Task:
        return ToyTask(folder=folder)


class TestClassification(TaskLaws):
    spec: TaskSpec = Classification()

    def open(self, folder: Path) -> Task:
        return self.spec.open("digits", CONFIG, folder, 0, {"max_samples": 100, "batch_size": 8})


class TestAugmentedSmoothedClassification(TestClassification):
    spec = Classification(label_smoothing=0.1, augment="crop")


class TestUncachedClassification(TestClassification):
    spec = Classification(augment="flip", cache_mb=0)


def test_every_law_has_a_broken_task() -> None:
    assert sorted(BROKEN) == LAWS


@pytest.mark.parametrize("broken", sorted(BROKEN))
def test_a_broken_task_breaks_its_law_alone(broken: str, tmp_path: Path) -> None:
    class Laws(TaskLaws):
        def open(self, folder: Path) -> Task:
            return BROKEN[broken](folder)

    for law in LAWS:
        folder = tmp_path / law
        if law == broken:
            with pytest.raises(AssertionError):
                getattr(Laws(), law)(folder)
        else:
            getattr(Laws(), law)(folder)


def test_the_model_of_the_laws_is_in_mixed_modes() -> None:
    model = TaskLaws().model(ToyTask())
    assert [m.training for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.Dropout)] == [False, True]
