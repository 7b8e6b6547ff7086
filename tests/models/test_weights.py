from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autopeft.errors import UsageError
from autopeft.models._weights import load_weights, read_tensors
from autopeft.testing.tiny import tiny_convnet, tiny_vit


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_ema"])
def test_saved_by_torch(tmp_path: Path, wrapper: str) -> None:
    donor = tiny_convnet(seed=1)
    state = {f"module.{k}": v for k, v in donor.state_dict().items()}
    path = tmp_path / "w.pth"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    model = tiny_convnet(seed=0)
    load_weights(model, path)
    assert all(torch.equal(v, donor.state_dict()[k]) for k, v in model.state_dict().items())


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}, path)
    assert read_tensors(path)["a"].item() == 1


def test_half_precision_is_widened(tmp_path: Path) -> None:
    donor = tiny_vit(seed=1)
    save_file({k: v.half() for k, v in donor.state_dict().items()}, tmp_path / "w.safetensors")
    model = tiny_vit(seed=0)
    load_weights(model, tmp_path / "w.safetensors")
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.blocks[0].mlp.fc1.weight, donor.blocks[0].mlp.fc1.weight.half().float())


def test_classifier_of_another_shape_is_dropped(tmp_path: Path) -> None:
    donor = tiny_vit(num_classes=9, seed=1)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    model = tiny_vit(num_classes=4, seed=0)
    before = model.head.weight.detach().clone()
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.norm.bias, donor.norm.bias)


def test_wrong_tensors_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = tiny_convnet(seed=1).state_dict()
    del state["blocks.0.conv1.weight"]
    state["extra.weight"] = torch.zeros(2)
    state["stem.weight"] = torch.zeros(8, 3, 3, 3)
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    model = tiny_convnet(seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_weights(model, path)
    text = str(caught.value)
    assert "1 missing (blocks.0.conv1.weight)" in text
    assert "1 unexpected (extra.weight)" in text
    assert "1 of another shape (stem.weight (8, 3, 3, 3) instead of (16, 3, 3, 3))" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("owned"),))  # type: ignore[return-value]


def test_files_that_hold_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no file of weights at 'none\.pth'"):
        read_tensors(Path("none.pth"))
    Path("bad.safetensors").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"'bad\.safetensors' cannot be read"):
        read_tensors(Path("bad.safetensors"))
    Path("bad.pth").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"'bad\.pth' cannot be read"):
        read_tensors(Path("bad.pth"))
    torch.save({"a": 1}, "number.pth")
    with pytest.raises(UsageError, match="holds no tensors by name"):
        read_tensors(Path("number.pth"))
    Path("code.pth").write_bytes(pickle.dumps({"a": _Payload()}))
    with pytest.raises(UsageError, match="cannot be read"):
        read_tensors(Path("code.pth"))
    assert not Path("owned").exists(), "reading weights must run no code"


def test_tensors_of_another_architecture_are_no_traceback(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="not those of VisionTransformer as built"):
        load_weights(tiny_vit(), tmp_path / "w.safetensors")
