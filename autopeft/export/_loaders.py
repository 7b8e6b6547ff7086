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
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(images))
    return getattr(found, "logits", found).float().contiguous().numpy()


failures = {}
for kind, job in request["jobs"].items():
    space = {"folder": job["folder"], "base": job["base"], "images": images, "run_torch": run_torch}
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
import timm
from peft import PeftModel

logits = run_torch(PeftModel.from_pretrained(timm.create_model("local-dir:" + base, pretrained=True), folder))
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
    "delta": _DELTA,
    "compressed": _COMPRESSED,
    "onnx": _ONNX,
}
"""Kind to the code that loads it."""
