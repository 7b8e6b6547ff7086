from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from autopeft.errors import AutopeftError, UnknownModel, UsageError
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec


@pytest.mark.parametrize(
    ("spec", "error", "parts"),
    [
        ("vit_tiny_patch16_225", UnknownModel, ["no model called 'vit_tiny_patch16_225'", "vit_tiny_patch16_224"]),
        ("zzzzzz", UnknownModel, ["no model called 'zzzzzz'", "timm.list_models()"]),
        ("resnet18.a1_in2k", UnknownModel, ["no weights 'a1_in2k' for resnet18", "resnet18.a1_in1k"]),
        ("google/vit", UnknownModel, ["'local-dir:google/vit'", "'hf-hub:google/vit'", "'vit'", "does not exist here"]),
        ("transformers:google/vit", UsageError, ["'transformers' are not supported yet", "a timm name", "hf-hub:"]),
        ("diffusers:no/such/folder#unet", UnknownModel, ["names no folder that exists here", "OWNER/NAME"]),
        ("tf:resnet", UnknownModel, ["unknown kind of model 'tf'", "py:package.module:function"]),
        (
            "bundled:vit_huge",
            UnknownModel,
            ["no model called 'vit_huge'", "it holds unet_tiny_fashion, vit_tiny_fashion"],
        ),
        ("local-dir:no/such/folder", UnknownModel, ["no folder 'no/such/folder'"]),
    ],
)
def test_specifications_that_lead_nowhere(spec: str, error: type[AutopeftError], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        load_model(ModelSpec(spec))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "repository"),
    [("resnet18", "timm/resnet18.a1_in1k"), ("hf-hub:someone/some-vit", "someone/some-vit")],
)
def test_no_network_is_said_at_once(
    spec: str, repository: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> socket.socket:
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(UnknownModel) as caught:
        load_model(ModelSpec(spec))
    assert time.monotonic() - started < 5
    text = str(caught.value)
    assert "the hub cannot be reached from here" in text
    assert f"`hf download {repository} --local-dir FOLDER`" in text
    assert "local-dir:FOLDER" in text
    assert "--pretrained-path" in text
    assert "\n" not in text
    assert capfd.readouterr().err == ""


def test_image_size_that_the_model_cannot_take() -> None:
    with pytest.raises(UsageError, match="does not run on images of 3 x 3 pixels with 3 channels"):
        load_model(ModelSpec(pretrained=False, img_size=3))
    with pytest.raises(UsageError, match=r"of another shape \(pos_embed .*image size"):
        load_model(ModelSpec(img_size=3))


def test_folder_that_exists_is_said_to_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel, match=r"'local-dir:runs/vit' for the folder \(which exists\)"):
        load_model(ModelSpec("runs/vit"))
