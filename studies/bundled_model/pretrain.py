"""Pre-train the bundled model: a small vision transformer on Fashion-MNIST, on a CPU, from one seed.

The four idx files come from the Debian package `dataset-fashion-mnist` or from the data set's own page
(https://github.com/zalandoresearch/fashion-mnist, MIT licence). Run from the root of the repository:

    python studies/bundled_model/pretrain.py --data FOLDER

It writes `vit_tiny_fashion.safetensors` (half precision) and `vit_tiny_fashion.json` (timm's configuration) into
`--output`, by default the package's own folder of weights, and prints the test accuracy of what was written.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import struct
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAME = "vit_tiny_fashion"
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 6, "num_heads": 4}
MEAN, STD = 0.2860, 0.3530
CLASSES = [
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
MAX_SHIFT = 1


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx file, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) in [0, 1], standardised, and labels (n,)."""
    files = {}
    for kind, rank in (("images", 3), ("labels", 1)):
        found = sorted(folder.glob(f"{prefix}-{kind}-idx{rank}-ubyte*"))
        if not found:
            raise SystemExit(f"no file {prefix}-{kind}-idx{rank}-ubyte[.gz] in {folder}")
        files[kind] = read_idx(found[0])
    images = torch.from_numpy(files["images"].astype(np.float32) / 255)
    return (images - MEAN) / STD, torch.from_numpy(files["labels"].astype(np.int64))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `MAX_SHIFT` pixels and mirror half of them; (b, 28, 28) in and out."""
    n, height, width = images.shape
    padded = F.pad(images, (MAX_SHIFT,) * 4, value=-MEAN / STD)
    dy, dx = torch.randint(0, 2 * MAX_SHIFT + 1, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    columns = dx[:, None] + torch.arange(width)
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model names rightly."""
    model.eval()
    hits = 0
    for i in range(0, len(images), 500):
        x = images[i : i + 500, None].expand(-1, 3, -1, -1)
        hits += int((model(x).argmax(1) == labels[i : i + 500]).sum())
    return hits / len(images)


def build() -> nn.Module:
    """The architecture with random weights."""
    model: nn.Module = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=len(CLASSES), **MODEL_ARGS)
    return model


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> nn.Module:
    """AdamW with warm-up and cosine decay on augmented images."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = build()
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    per_epoch = len(images) // args.batch_size
    total = args.epochs * per_epoch
    warm_up = max(1, total // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * max(0, s - warm_up) / (total - warm_up)))),
    )
    started = time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        losses = []
        for step in range(per_epoch):
            index = order[step * args.batch_size : (step + 1) * args.batch_size]
            x = augment(images[index], generator)[:, None].expand(-1, 3, -1, -1)
            loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if step % 100 == 0:
                print(f"epoch {epoch} step {step}/{per_epoch} {time.monotonic() - started:.0f}s", flush=True)
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model


def write(model: nn.Module, folder: Path, test_accuracy: float, args: argparse.Namespace) -> Path:
    """Half-precision weights and timm's configuration beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    path = folder / f"{NAME}.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASSES),
        "num_features": MODEL_ARGS["embed_dim"],
        "global_pool": "token",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "fashion_mnist",
            "custom_load": False,
            "input_size": [3, 28, 28],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "num_classes": len(CLASSES),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
            "label_names": CLASSES,
        },
        "training": {
            "data": "Fashion-MNIST",
            "test_accuracy": round(test_accuracy, 4),
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "weight_decay": args.weight_decay,
            "seed": args.seed,
        },
    }
    (folder / f"{NAME}.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


def main() -> None:
    """Train, write, read back, and print the accuracy of what was read back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four idx files")
    parser.add_argument("--output", type=Path, default=Path("autopeft/models/weights"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    model = train(*read_split(args.data, "train"), args)
    test = read_split(args.data, "t10k")
    rounded = build()
    rounded.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    path = write(model, args.output, accuracy(rounded, *test), args)
    rounded.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    print(
        f"{path}: {sum(p.numel() for p in rounded.parameters()):,} parameters, {path.stat().st_size:,} bytes, "
        f"test accuracy {accuracy(rounded, *test):.4f}, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
