"""What a fresh process runs to load exports: text that never imports autopeft."""

from __future__ import annotations

__all__ = ["DRIVER", "LOADERS"]

DRIVER = '''
import json, sys, traceback, warnings


class Refuse:
    """Proof that the exports stand alone."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "autopeft":
            raise ImportError("an export must load without autopeft")
        return None


sys.meta_path.insert(0, Refuse())
warnings.simplefilter("ignore")
request = json.load(open(sys.argv[1], encoding="utf-8"))

from safetensors.numpy import load_file as load_arrays, save_file as save_arrays

images = load_arrays(request["images"])["images"]


def run_torch(model):
    import torch

    torch.set_num_threads(1)
    x = torch.from_numpy(images)
    with torch.no_grad():
        found = model.eval()(x, **beside(model, x))
    found = found[0] if isinstance(found, tuple) else getattr(found, "logits", found)
    return found.float().contiguous().numpy()


def beside(model, x):
    """What a denoiser of diffusers is given beside images: timesteps, labels and texts of zeros."""
    import inspect, torch

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = inspect.signature(type(plain).forward).parameters
    if "timestep" not in taken:
        return {}
    zeros = torch.zeros(len(x), dtype=torch.int64)
    given = {"timestep": zeros, "return_dict": False}
    tables = ("class_embedding", "class_embedder")
    if "class_labels" in taken and any(name.rpartition(".")[2] in tables for name, _ in plain.named_modules()):
        given["class_labels"] = zeros
    keys = ("encoder_hid_dim", "caption_channels", "cross_attention_dim", "joint_attention_dim")
    width = next((plain.config[key] for key in keys if plain.config.get(key)), 0)
    width = width[0] if isinstance(width, (list, tuple)) else width
    if "encoder_hidden_states" in taken and width:
        given["encoder_hidden_states"] = torch.zeros(len(x), 4, width)
    if "added_cond_kwargs" in taken and "caption_channels" in plain.config:
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return given


def base_model(base):
    """A base model written by timm or by diffusers."""
    import json, os

    with open(os.path.join(base, "config.json"), encoding="utf-8") as file:
        kind = json.load(file).get("_class_name")
    if kind:
        import diffusers

        return getattr(diffusers, kind).from_pretrained(base, local_files_only=True)
    import timm

    return timm.create_model("local-dir:" + base, pretrained=True)


failures = {}
for kind, job in request["jobs"].items():
    space = {"folder": job["folder"], "base": job["base"], "images": images, "run_torch": run_torch}
    space["base_model"] = base_model
    try:
        exec(compile(job["code"], kind, "exec"), space)
        save_arrays({"logits": space["logits"]}, job["logits"])
    except Exception:
        failures[kind] = traceback.format_exc()
assert "autopeft" not in sys.modules
json.dump(failures, open(request["failures"], "w", encoding="utf-8"))
'''
"""Refuses autopeft, then runs the code of every job; each leaves `logits`, a float32 array."""

_TIMM = """
import timm

logits = run_torch(timm.create_model("local-dir:" + folder, pretrained=True))
"""

_TRANSFORMERS = """
from transformers import AutoModelForImageClassification

logits = run_torch(AutoModelForImageClassification.from_pretrained(folder))
"""

_PEFT = """
from peft import PeftModel

logits = run_torch(PeftModel.from_pretrained(base_model(base), folder))
"""

_DIFFUSERS = """
import os

part = next(name for name in ("unet", "transformer") if os.path.isdir(os.path.join(folder, name)))
logits = run_torch(base_model(os.path.join(folder, part)))
"""

_DIFFUSERS_LORA = """
model = base_model(base)
prefix = "unet" if type(model).__name__.startswith("UNet") else "transformer"
model.load_lora_adapter(folder, prefix=prefix, weight_name="pytorch_lora_weights.safetensors", local_files_only=True)
logits = run_torch(model)
"""

_DELTA = """
import os, re, timm

readme = open(os.path.join(folder, "README.md"), encoding="utf-8").read()
code = next(block for block in re.findall(r"```python\\n(.*?)```", readme, re.S) if "def apply_delta" in block)
exec(code)
model = timm.create_model("local-dir:" + base, pretrained=True)
apply_delta(model, os.path.join(folder, "delta.safetensors"))
logits = run_torch(model)
"""

_COMPRESSED = """
import os, sys, timm

sys.dont_write_bytecode = True
sys.path.insert(0, folder)
from load_compressed import apply_compressed

model = timm.create_model("local-dir:" + base, pretrained=True)
apply_compressed(model, os.path.join(folder, "compressed.safetensors"))
logits = run_torch(model)
"""

_ONNX = """
import importlib.util, os

path = os.path.join(folder, "model.onnx")
if importlib.util.find_spec("onnxruntime"):
    import onnxruntime

    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run
else:
    from onnx.reference import ReferenceEvaluator

    run = ReferenceEvaluator(path).run
logits = run(None, {"image": images})[0]
"""

LOADERS = {
    "timm": _TIMM,
    "transformers": _TRANSFORMERS,
    "peft": _PEFT,
    "peft-init": _PEFT,
    "diffusers": _DIFFUSERS,
    "diffusers-lora": _DIFFUSERS_LORA,
    "delta": _DELTA,
    "compressed": _COMPRESSED,
    "onnx": _ONNX,
}
"""Kind to the code that loads it."""
