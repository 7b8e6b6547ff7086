from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autopeft.errors import CorruptFile
from autopeft.training.checkpoint import Checkpoint, Progress, load_adapter, save_adapter, trainable_in_file
from autopeft.training.optim import make_optimizer
from autopeft.training.settings import TrainSettings

PROGRESS = Progress("me", 2, 1, 0.5, 3.25, (1.5, 0.1), ((1, 0.25), (2, 1 / 3)), {"top1": 1 / 3})


def _trained(insert: Callable[..., Any], methods: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    inserted = insert()
    optimizer = make_optimizer(inserted, TrainSettings(), methods)
    for _ in range(2):
        inserted.model(torch.ones(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    return inserted, optimizer


def test_adapter_file_holds_the_state_and_the_fourth_count(insert: Callable[..., Any], tmp_path: Path) -> None:
    inserted = insert()
    path = save_adapter(inserted, tmp_path / "deep" / "adapter.safetensors")
    read = load_adapter(path)
    assert read.keys() == inserted.state().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in inserted.state().items())
    assert trainable_in_file(path) == 420  # buffers and head are in the file and do not count
    assert [p.name for p in path.parent.iterdir()] == ["adapter.safetensors"]
    assert path.stat().st_size < 4 * (420 + 3 + 52) + 1000


def test_count_by_hand_includes_scalars_and_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"adapter/a/m/x": torch.zeros(2, 3), "adapter/b/m/y": torch.tensor(1.0), "adapter/c/m/z": torch.zeros(0)}
    save_file(tensors | {"head/w": torch.zeros(99), "notadapter/x": torch.zeros(7)}, path)
    assert trainable_in_file(path) == 7


def test_views_and_shared_memory_are_saved(insert: Callable[..., Any], tmp_path: Path) -> None:
    inserted = insert()
    big = torch.arange(12.0).reshape(3, 4)
    inserted.state = lambda: {"adapter/a/m/x": big.T, "adapter/a/m/y": big[1:], "head/w": big}
    read = load_adapter(save_adapter(inserted, tmp_path / "a.safetensors"))
    assert torch.equal(read["adapter/a/m/x"], big.T)
    assert torch.equal(read["adapter/a/m/y"], big[1:])


def test_round_trip(insert: Callable[..., Any], methods: dict[str, Any], tmp_path: Path) -> None:
    inserted, optimizer = _trained(insert, methods)
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    checkpoint.save(PROGRESS, inserted, optimizer, {"cpu": torch.get_rng_state()})
    resumed = checkpoint.load("me")
    assert resumed is not None
    assert resumed.progress == PROGRESS
    assert torch.equal(resumed.rng["cpu"], torch.get_rng_state())
    assert all(torch.equal(resumed.state[n], t) for n, t in inserted.state().items())
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(resumed.optimizer[index][n], t) for n, t in moments.items())
    assert trainable_in_file(checkpoint.path) == 420
    checkpoint.clear()
    assert checkpoint.load("me") is None
    checkpoint.clear()


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "length":
        path.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    elif how == "text":
        path.write_bytes(b"not safetensors at all" * 10)
    elif how == "keys":
        save_file(load_file(path), path)  # no metadata
    elif how == "schema":
        save_file(load_file(path), path, {"progress": '{"schema": "autopeft.checkpoint/99"}'})
    elif how == "optimizer":
        save_file({"optimizer/x/exp_avg": torch.zeros(1)}, path, {"progress": '{"identity": "me", "epoch": 1}'})


@pytest.mark.parametrize("how", ["empty", "short", "length", "text", "keys", "schema", "optimizer"])
def test_a_damaged_checkpoint_is_logged_and_ignored(
    insert: Callable[..., Any], methods: dict[str, Any], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(PROGRESS, *_trained(insert, methods), {})
    _damage(checkpoint.path, how)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load("me") is None
    assert "training starts from the beginning" in caplog.text
    assert "training.safetensors" in caplog.text


def test_a_checkpoint_of_another_training_is_ignored(
    insert: Callable[..., Any], methods: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(PROGRESS, *_trained(insert, methods), {})
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load("you") is None
    assert "of another training" in caplog.text


@pytest.mark.parametrize("how", ["empty", "short", "length", "text"])
def test_damaged_adapter_files_are_corrupt(insert: Callable[..., Any], tmp_path: Path, how: str) -> None:
    path = save_adapter(insert(), tmp_path / "a.safetensors")
    _damage(path, how)
    with pytest.raises(CorruptFile, match=r"a\.safetensors is not a readable"):
        load_adapter(path)
    if how != "short":  # the header of a truncated file is whole
        with pytest.raises(CorruptFile, match=r"a\.safetensors is not a readable"):
            trainable_in_file(path)


def test_a_missing_file_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile):
        trainable_in_file(tmp_path / "none")


def test_nothing_is_unpickled(insert: Callable[..., Any], methods: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(PROGRESS, *_trained(insert, methods), {})
    assert b"pickle" not in checkpoint.path.read_bytes()
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def test_a_failed_write_leaves_the_old_file(
    insert: Callable[..., Any], methods: dict[str, Any], tmp_path: Path
) -> None:
    inserted, optimizer = _trained(insert, methods)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(PROGRESS, inserted, optimizer, {})
    before = checkpoint.path.read_bytes()
    inserted.state = lambda: {"adapter/x": torch.zeros(1, device="meta")}
    with pytest.raises((RuntimeError, NotImplementedError)):
        checkpoint.save(PROGRESS, inserted, optimizer, {})
    assert checkpoint.path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
