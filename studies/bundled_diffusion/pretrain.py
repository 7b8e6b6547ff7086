"""Pre-train the bundled denoiser: a small class-conditional U-Net on Fashion-MNIST, on a CPU, from one seed.

The four idx files come from the Debian package `dataset-fashion-mnist` or from the data set's own page
(https://github.com/zalandoresearch/fashion-mnist, MIT licence). Run from the root of the repository:

    python studies/bundled_diffusion/pretrain.py --data FOLDER

It writes a folder as diffusers reads it (`unet/config.json`, `unet/diffusion_pytorch_model.safetensors` in half
precision, `scheduler/scheduler_config.json`) into `--output`, by default the package's own folder of weights, and
prints the denoising loss on the test images, at fixed noise, of what was written.
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
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

NAME = "unet_tiny_fashion"
CLASSES = 10
EMPTY = CLASSES
"""The label of no class, which a share of the training images carries."""
UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "num_class_embeds": CLASSES + 1,
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
DROP = 0.1
EMA = 0.995


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx file, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 16, 16) in [-1, 1] (28 x 28 with a border of 2, halved by averaging), and labels (n,)."""
    files = {}
    for kind, rank in (("images", 3), ("labels", 1)):
        found = sorted(folder.glob(f"{prefix}-{kind}-idx{rank}-ubyte*"))
        if not found:
            raise SystemExit(f"no file {prefix}-{kind}-idx{rank}-ubyte[.gz] in {folder}")
        files[kind] = read_idx(found[0])
    images = torch.from_numpy(files["images"].astype(np.float32) / 255)[:, None]
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2)), 2) * 2 - 1, torch.from_numpy(files["labels"].astype(np.int64))


def denoising_loss(model: nn.Module, scheduler: DDPMScheduler, images: Tensor, labels: Tensor, seed: int) -> float:
    """Mean squared error of the predicted noise, at noise and timesteps that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(images), 250):
            x = images[i : i + 250]
            noise = torch.randn(x.shape, generator=generator)
            t = torch.randint(0, SCHEDULER["num_train_timesteps"], (len(x),), generator=generator)
            predicted = model(scheduler.add_noise(x, noise, t), t, class_labels=labels[i : i + 250]).sample
            total += float(F.mse_loss(predicted, noise)) * len(x)
    return total / len(images)


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """AdamW with warm-up and cosine decay; returns the exponential moving average of the weights."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    scheduler = DDPMScheduler(**SCHEDULER)
    model = UNet2DModel(**UNET)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    warm_up = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * max(0, s - warm_up) / (args.steps - warm_up)))),
    )
    model.train()
    started, losses = time.monotonic(), []
    order = torch.empty(0, dtype=torch.int64)
    for step in range(args.steps):
        if len(order) < args.batch_size:
            order = torch.randperm(len(images), generator=generator)
        index, order = order[: args.batch_size], order[args.batch_size :]
        x, y = images[index], labels[index]
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        y = torch.where(torch.rand(len(y), generator=generator) < DROP, EMPTY, y)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(0, SCHEDULER["num_train_timesteps"], (len(x),), generator=generator)
        loss = F.mse_loss(model(scheduler.add_noise(x, noise, t), t, class_labels=y).sample, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{args.steps}: loss {np.mean(losses[-100:]):.4f}, {seconds:.0f} s", flush=True)
    return average


def main() -> None:
    """Train, write, read back, and print the denoising loss of what was read back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four idx files")
    parser.add_argument("--output", type=Path, default=Path("autopeft/models/weights") / NAME)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    average = train(*read_split(args.data, "train"), args)
    model = UNet2DModel(**UNET)
    model.load_state_dict({k: v.half() for k, v in average.items()})
    model.half().save_pretrained(args.output / "unet")
    scheduler = DDPMScheduler(**SCHEDULER)
    scheduler.save_pretrained(args.output / "scheduler")
    path = args.output / "unet" / "diffusion_pytorch_model.safetensors"
    path.chmod(0o644)
    model = UNet2DModel.from_pretrained(args.output / "unet").float()
    loss = denoising_loss(model, scheduler, *read_split(args.data, "t10k"), seed=0)
    facts = {
        "data": "Fashion-MNIST, 16 x 16",
        "license": "mit",
        "test_denoising_loss": round(loss, 5),
        "empty_label": EMPTY,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
    }
    (args.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(
        f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, {path.stat().st_size:,} bytes, "
        f"test denoising loss {loss:.5f}, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
