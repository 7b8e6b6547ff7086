"""How each kind of export is loaded, as a few lines of Python."""

from __future__ import annotations

__all__ = ["loading_notes"]

_NOTES = {
    "timm": """import timm

model = timm.create_model("local-dir:{path}", pretrained=True)""",
    "peft": """import timm
from peft import PeftModel

base = ...  # the base model with its pre-trained weights: the README.md in the folder builds it
model = PeftModel.from_pretrained(base, "{path}").eval()""",
    "delta": """from safetensors.torch import load_file

delta = load_file("{path}/delta.safetensors")  # the README.md in the folder holds the function that applies it""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{path}/model.onnx")
(logits,) = session.run(None, {{"image": images}})  # float32, (batch, channels, height, width)""",
}


def loading_notes(kind: str, path: str) -> str:
    """Python that loads an export of this kind from `path`; empty for kinds that only autopeft reads."""
    kind = kind.partition("-")[0]
    return _NOTES[kind].format(path=path) if kind in _NOTES else ""
