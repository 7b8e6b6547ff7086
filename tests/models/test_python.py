from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autopeft.errors import UnknownModel, UsageError
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec
from autopeft.testing.tiny import tiny_convnet, tiny_vit

SPEC = "py:autopeft.testing.tiny:tiny_convnet"


def test_function_is_called_with_the_arguments(tmp_path: Path) -> None:
    save_file(tiny_convnet(seed=5, width=8).state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    loaded = load_model(ModelSpec(SPEC, pretrained_path=path, img_size=16, kwargs={"width": 8, "num_classes": 3}))
    assert loaded.model.stem.weight.shape[0] == 8
    assert torch.equal(loaded.model.stem.weight, tiny_convnet(seed=5, width=8).stem.weight)
    assert loaded.data_config["input_size"] == (3, 16, 16)
    assert (loaded.architecture, loaded.model_args) == ("_ConvNet", {"width": 8, "num_classes": 3})
    catalog = loaded.reset_head(6, 0)
    assert loaded.model(torch.zeros(2, 3, 16, 16)).shape == (2, 6)
    assert catalog.head == ("fc",)


def test_module_of_the_current_folder_with_its_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mymodel_of_a_user.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    pretrained_cfg = {'input_size': (1, 6, 6), 'mean': (0.5,), 'std': (0.2,), 'classifier': '2'}\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(1, 4, 6), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load_model(ModelSpec("py:mymodel_of_a_user:Net"))
    assert loaded.data_config["input_size"] == (1, 6, 6)
    assert loaded.data_config["mean"] == (0.5,)
    assert loaded.reset_head(3, 0).head == ("2",)


def test_initialisation_is_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seeded_module_of_a_user.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 224), nn.Flatten(), nn.Linear(4, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec("py:seeded_module_of_a_user:build")
    assert load_model(spec).weights_hash == load_model(spec).weights_hash


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("py:autopeft.testing.tiny", UsageError, "should read 'py:package.module:function'"),
        ("py:nothing.like.this:build", UnknownModel, "no Python module 'nothing'"),
        ("py:autopeft.testing.tinny:tiny_vit", UnknownModel, "no Python module 'autopeft.testing.tinny'"),
        ("py:autopeft.testing.tiny:tiny_vitt", UnknownModel, "did you mean 'tiny_vit'"),
        ("py:math:pi", UsageError, "'pi' of 'math' is no function but a float"),
        ("py:pathlib:Path", UsageError, "should return a torch.nn.Module, it returned a PosixPath"),
    ],
)
def test_targets_that_lead_nowhere(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(ModelSpec(spec))


def test_broken_modules_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more_of_a_user.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "broken_of_a_user.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel, match="no Python module 'no_such_package_at_all', which 'needs_more_of_a_user'"):
        load_model(ModelSpec("py:needs_more_of_a_user:build"))
    with pytest.raises(UnknownModel, match="'broken_of_a_user' cannot be imported"):
        load_model(ModelSpec("py:broken_of_a_user:build"))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="does not take the model's arguments"):
        load_model(ModelSpec(SPEC, kwargs={"depth": 3}))
    assert tiny_vit(num_classes=2).head.weight.shape == (2, 16)
