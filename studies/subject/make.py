"""A subject to learn, offline: eight images of one handwritten zero with masks, and prior images of the model's own.

    python studies/subject/make.py --output FOLDER

The subject is one image of scikit-learn's digits, moved by up to two pixels; its mask is white where there is ink and
next to it. Prior images are DDIM samples of the bundled denoiser without a class, as DreamBooth takes them from the
model that is fine-tuned. `metadata.jsonl` says which is which. Equal arguments give equal files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec
from autopeft.tasks.diffusion import Diffusion

SIDE = 16
EMPTY = 10
"""The bundled denoiser's label of no class."""
MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (2, 0))


def subject() -> list[tuple[Tensor, Tensor]]:
    """Images and masks, each (16, 16) in [0, 1]."""
    glyph = torch.tensor(load_digits().images[0], dtype=torch.float32)[None, None] / 16
    large = F.interpolate(glyph, size=(12, 12), mode="bilinear", align_corners=False)
    canvas = F.pad(large, (2, 2, 2, 2))
    found = []
    for down, right in MOVES:
        image = canvas.roll((down, right), (2, 3))
        mask = (F.max_pool2d(image, 3, 1, 1) > 0.1).float()
        found.append((image[0, 0], mask[0, 0]))
    return found


def priors(count: int, steps: int) -> Tensor:
    """Samples of the bundled denoiser without a class, (count, 16, 16) in [0, 1]."""
    loaded = load_model(ModelSpec("bundled:unet_tiny_fashion"))
    options = {"batch_size": 16, "max_samples": 60}
    task = Diffusion(steps=steps, draws=1).open("digits", loaded.data_config, None, 0, options)
    made = task.sample(loaded.model, count, 0, torch.full((count,), EMPTY))
    return (made[:, 0] + 1) / 2


def write(path: Path, grey: Tensor) -> None:
    """A picture (h, w) in [0, 1] as a PNG file of grey values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grey.clamp(0, 1) * 255).round().numpy().astype(np.uint8)).save(path)


def make(output: Path, count: int = 24, steps: int = 25) -> int:
    """Write the folder; the number of images."""
    lines = []
    for i, (image, mask) in enumerate(subject()):
        write(output / "subject" / f"{i}.png", image)
        write(output / "masks" / f"{i}.png", mask)
        lines.append({"file_name": f"subject/{i}.png", "label": "subject", "mask": f"masks/{i}.png"})
    for i, image in enumerate(priors(count, steps)):
        write(output / "prior" / f"{i:02d}.png", image)
        lines.append({"file_name": f"prior/{i:02d}.png", "label": "anything", "prior": True})
    (output / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--priors", type=int, default=24)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    print(f"{args.output}: {make(args.output, args.priors, args.steps)} images")


if __name__ == "__main__":
    main()
