from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autopeft.core.registry import Registry
from autopeft.errors import DataError, Diverged, StaleRun, StoreError, UnknownKey, UsageError
from autopeft.tasks import BUILTIN
from autopeft.tasks._labelled import LabelledTask
from autopeft.tasks.classification import Classification, _augmented

Tree = Callable[[dict[str, int]], Path]
TWO = {"train/cat": 10, "train/dog": 10, "val/cat": 4, "val/dog": 4}


def linear(task: LabelledTask) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, len(task.classes)))


@pytest.fixture(scope="module")
def digits_task() -> LabelledTask:
    config = dict.fromkeys(("mean", "std"), (0.5,) * 3)
    return Classification().open(
        "digits",
        {**config, "input_size": (3, 28, 28), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"},
        None,
        0,
        {},
    )


def test_digits_are_cut_500_400_897_and_stratified(digits_task: LabelledTask) -> None:
    assert digits_task.sizes == {"inner": 500, "outer": 400, "test": 897}
    assert digits_task.classes == tuple("0123456789")
    images, labels = next(iter(digits_task.batches("inner")))
    assert images.shape == (64, 3, 28, 28)
    assert labels.shape == (64,)
    assert float(images.min()) >= -1.0
    assert float(images.max()) <= 1.0
    counts = Counter(int(y) for _, labels in digits_task.batches("inner") for y in labels)
    # UCI digits have 174 to 183 samples of a class: 48.4 to 50.9 of 500.
    assert set(counts.values()) <= {48, 49, 50, 51}


def test_a_folder_with_train_and_val(tree: Tree, config: dict[str, Any], tmp_path: Path) -> None:
    task = Classification().open(str(tree(TWO)), config, tmp_path / "run", 0, {"batch_size": 3})
    assert task.classes == ("cat", "dog")
    assert task.sizes == {"inner": 16, "outer": 4, "test": 8}
    assert [len(y) for _, y in task.batches("inner")] == [3, 3, 3, 3, 3, 1]
    assert len(task.batches("inner")) == 6
    assert (tmp_path / "run" / "splits.json").exists()


def test_the_union_of_splits_is_shuffled_as_one(tree: Tree, config: dict[str, Any]) -> None:
    task = Classification(augment="none").open(str(tree(TWO)), config, None, 0, {"batch_size": 5})
    both = torch.cat([x for x, _ in task.batches_of(("inner", "outer"))])
    parts = torch.cat([x for split in ("inner", "outer") for x, _ in task.batches(split)])  # type: ignore[arg-type]
    assert torch.equal(both, parts)
    shuffled = torch.cat([x for x, _ in task.batches_of(("inner", "outer"), seed=1)])
    assert not torch.equal(shuffled[:16].sort(0).values, both[:16].sort(0).values)
    assert Counter(x.numpy().tobytes() for x in shuffled) == Counter(x.numpy().tobytes() for x in both)
    with pytest.raises(StoreError, match="sealed"):
        task.batches_of(("inner", "test"))
    for splits in ((), ("inner", "inner"), ("all",)):
        with pytest.raises(UsageError, match="splits must be distinct"):
            task.batches_of(splits)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_size=0"):
        task.batches("inner", batch_size=0)


def test_only_walks_with_inner_are_augmented(tree: Tree, config: dict[str, Any]) -> None:
    task = Classification(augment="crop").open(str(tree(TWO)), config, None, 0, {})

    def images(*splits: str, seed: int | None = None) -> set[bytes]:
        return {x.numpy().tobytes() for xs, _ in task.batches_of(splits, seed) for x in xs}  # type: ignore[arg-type]

    assert images("outer", seed=1) == images("outer")
    assert images("inner", seed=1) != images("inner")
    assert images("inner", seed=1) != images("inner", seed=2)
    assert len(images("inner", "outer", seed=1) & images("outer")) < 4


def test_augmentations_move_pixels_and_nothing_else() -> None:
    images = torch.rand(64, 3, 16, 16)
    assert _augmented(images, "none", torch.Generator()) is images
    flipped = _augmented(images, "flip", torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, images, strict=True)]
    plain = [torch.equal(a, b) for a, b in zip(flipped, images, strict=True)]
    assert all(m != p for m, p in zip(mirrored, plain, strict=True))
    assert 20 <= sum(mirrored) <= 44
    ramp = torch.arange(16.0).expand(200, 1, 16, 16)
    shifts = _augmented(ramp, "crop", torch.Generator().manual_seed(0))[:, 0, 8, 8] - 8
    assert set(shifts.int().tolist()) == {-2, -1, 0, 1, 2}


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.9), st.integers(0, 100))
def test_losses_are_smoothed_cross_entropy(smoothing: float, seed: int) -> None:
    from autopeft.testing.toy_task import ToyTask

    task = ToyTask(seed=seed)
    task._label_smoothing = smoothing
    model = linear(task).double()
    images, labels = next(iter(task.batches("inner")))
    log_p = model(images.double()).float().log_softmax(1)
    target = (1 - smoothing) * F.one_hot(labels, 4) + smoothing / 4
    torch.testing.assert_close(task.losses(model, (images.double(), labels)), -(target * log_p).sum(1))


def test_metrics_do_not_smooth(tree: Tree, config: dict[str, Any]) -> None:
    root = str(tree(TWO))
    plain, smoothed = (Classification(s).open(root, config, None, 0, {}) for s in (0.0, 0.3))
    model = linear(plain)
    assert plain.evaluate(model, "outer") == smoothed.evaluate(model, "outer")
    assert set(plain.evaluate(model, "outer")) == {"top1", "macro_f1", "ece", "nll", "scaled_nll"}


def test_a_model_of_other_outputs_is_refused(tree: Tree, config: dict[str, Any]) -> None:
    task = Classification().open(str(tree(TWO)), config, None, 0, {})
    batch = next(iter(task.batches("inner")))
    with pytest.raises(UsageError, match=r"\(batch, 2\).*returned \(16, 3\)"):
        task.loss(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), batch)


def test_outputs_that_are_not_finite_are_divergence(tree: Tree, config: dict[str, Any]) -> None:
    task = Classification().open(str(tree(TWO)), config, None, 0, {})
    model = linear(task)
    nn.init.constant_(model[1].bias, float("nan"))  # type: ignore[index]
    with pytest.raises(Diverged, match="'outer' are not finite"):
        task.evaluate(model, "outer")


def test_outputs_may_be_wrapped_as_transformers_does(tree: Tree, config: dict[str, Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.inner(x))

    task = Classification().open(str(tree(TWO)), config, None, 0, {})
    model = linear(task)
    assert torch.equal(task.predict(Wrapped(model), "outer")[0], task.predict(model, "outer")[0])


def test_images_in_two_splits_are_left_out(
    tree: Tree, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(TWO)
    for i in range(3):
        shutil.copy(root / f"val/cat/img{i}.png", root / f"train/cat/copy{i}.png")
    task = Classification().open(str(root), config, None, 0, {})
    assert sum(task.sizes.values()) == 28
    assert task.sizes["test"] == 8
    assert all("also in a later split" in r.getMessage() for r in caplog.records)
    assert caplog.records


def test_a_class_lost_to_duplicates_is_an_error(tree: Tree, config: dict[str, Any]) -> None:
    root = tree(TWO)
    shutil.rmtree(root / "train/cat")
    shutil.copytree(root / "val/cat", root / "train/cat")
    with pytest.raises(DataError, match="class 'cat' must be in every split"):
        Classification().open(str(root), config, None, 0, {})


def test_a_corrupt_image_is_named_before_anything_is_written(
    tree: Tree, config: dict[str, Any], tmp_path: Path
) -> None:
    root = tree(TWO)
    bad = root / "train/dog/img4.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot read the image .*train/dog/img4\.png"):
        Classification().open(str(root), config, tmp_path / "run", 0, {})
    assert not (tmp_path / "run").exists()


def test_reopening_reads_the_splits_back(tree: Tree, config: dict[str, Any], tmp_path: Path) -> None:
    root, run = tree({"cat": 10, "dog": 10}), tmp_path / "run"
    first = Classification().open(str(root), config, run, 0, {})
    before = (run / "splits.json").read_bytes()
    moved = root.rename(tmp_path / "moved")
    second = Classification().open(str(moved), config, run, 0, {"batch_size": 2})
    assert (run / "splits.json").read_bytes() == before
    assert first.data_hash == second.data_hash
    assert first.sizes == second.sizes == {"inner": 12, "outer": 4, "test": 4}


def test_other_settings_or_data_are_stale(tree: Tree, config: dict[str, Any], tmp_path: Path) -> None:
    root, run, spec = tree({"cat": 10, "dog": 10}), tmp_path / "run", Classification()
    spec.open(str(root), config, run, 0, {})
    with pytest.raises(StaleRun, match=r"val_frac=0\.3"):
        spec.open(str(root), config, run, 0, {"val_frac": 0.3})
    with pytest.raises(StaleRun, match="seed=1"):
        spec.open(str(root), config, run, 1, {})
    with pytest.raises(StaleRun, match="classes cat, dog"):
        spec.open("digits", config, run, 0, {})
    shutil.copy(root / "dog/img1.png", root / "cat/img0.png")
    task = spec.open(str(root), config, run, 0, {})
    task.unseal_test()
    with pytest.raises(StaleRun, match=r"cat/img0\.png is not the one"):
        list(task.batches_of(("inner", "outer", "test")))
    (root / "cat/img0.png").unlink()
    with pytest.raises(StaleRun, match=r"cat/img0\.png of .* is gone"):
        spec.open(str(root), config, run, 0, {})


def test_a_finish_that_was_cut_off_goes_on_with_its_token(tree: Tree, config: dict[str, Any], tmp_path: Path) -> None:
    root, spec = str(tree(TWO)), Classification()
    spec.open(root, config, tmp_path, 0, {"unseal_token": "finish-1"}).unseal_test()
    again = spec.open(root, config, tmp_path, 0, {"unseal_token": "finish-1"})
    again.unseal_test()
    assert sum(len(y) for _, y in again.batches("test")) == 8
    with pytest.raises(StoreError, match="opened before"):
        spec.open(root, config, tmp_path, 0, {"unseal_token": "finish-2"}).unseal_test()
    with pytest.raises(StoreError, match="opened before"):
        spec.open(root, config, tmp_path, 0, {}).unseal_test()


def test_the_data_hash_follows_data_and_cut(tree: Tree, config: dict[str, Any]) -> None:
    root, spec = str(tree({"cat": 10, "dog": 10})), Classification()

    def digest(seed: int = 0, **options: Any) -> str:
        return spec.open(root, config, None, seed, options).data_hash

    first = digest()
    assert digest() == first
    assert digest(batch_size=2, workers=1) == first
    assert len({first, digest(1), digest(val_frac=0.3), digest(max_inner=6)}) == 4
    assert spec.open(root, config | {"input_size": (3, 4, 4)}, None, 0, {}).data_hash == first


def test_a_grey_model_reads_one_channel(tree: Tree, config: dict[str, Any]) -> None:
    task = Classification().open(str(tree(TWO)), config | {"input_size": (1, 8, 8)}, None, 0, {})
    assert next(iter(task.batches("inner")))[0].shape == (16, 1, 8, 8)


def test_a_model_can_learn_the_digits(digits_task: LabelledTask) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(147, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for epoch in range(8):
        for batch in digits_task.batches("inner", epoch):
            optimizer.zero_grad()
            digits_task.loss(model, batch).backward()
            optimizer.step()
    assert digits_task.evaluate(model, "outer")["top1"] > 0.85


def test_an_unknown_option_is_refused_before_the_data_is_read(config: dict[str, Any]) -> None:
    with pytest.raises(UnknownKey, match="Did you mean 'max_inner'"):
        Classification().open("nowhere", config, None, 0, {"max_iner": 3})


@pytest.mark.parametrize(
    "bad", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"augment": "mixup"}, {"cache_mb": -1}]
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Classification(**bad)


def test_the_table_names_the_class() -> None:
    registry: Registry[Classification] = Registry("task", "autopeft.tasks", BUILTIN)
    assert registry["classification"] is Classification
