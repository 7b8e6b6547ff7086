"""How much an adapter can win on the bundled task: a linear probe against full fine-tuning, digits as target.

    python studies/bundled_gap/run.py

Writes `result.json` beside this file. Digits come cut into 500 inner, 400 outer and 897 test images. Both contenders
train on inner and choose their one hyper-parameter on outer (C of a logistic regression on standardised frozen
features, solved by L-BFGS to convergence; the learning rate of AdamW), then look at test once. The interval is a
paired bootstrap over the test images.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec
from autopeft.tasks.classification import Classification

MODEL = "bundled:vit_tiny_fashion"
STRENGTHS = [10.0**e for e in range(-4, 4)]
RATES = [1e-4, 3e-4, 1e-3, 2e-3]
BATCH = 25


def build(seed: int) -> nn.Module:
    """The bundled model with a fresh head of 10 classes."""
    loaded = load_model(ModelSpec(MODEL))
    loaded.reset_head(10, seed)
    return loaded.model


def read_splits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of the bundled task, cut and preprocessed as the program does it."""
    task = Classification().open("digits", load_model(ModelSpec(MODEL)).data_config, None, seed, {})
    task.unseal_test()
    splits = {}
    for split in ("inner", "outer", "test"):
        images, labels = zip(*task.batches(split), strict=True)
        splits[split] = (torch.cat(images), torch.cat(labels))
    return splits


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> np.ndarray:
    """What the head sees."""
    model.eval()
    parts = [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(200)]
    return torch.cat(parts).double().numpy()


@torch.no_grad()
def hits(model: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray:
    """1 where the model is right."""
    model.eval()
    return (torch.cat([model(x).argmax(1) for x in images.split(200)]) == labels).double().numpy()


def probe(splits: dict[str, tuple[Tensor, Tensor]]) -> tuple[dict, np.ndarray]:
    """Tuned, converged logistic regression on frozen features."""
    model = build(0)
    x = {k: features(model, images) for k, (images, _) in splits.items()}
    y = {k: labels.numpy() for k, (_, labels) in splits.items()}
    scaler = StandardScaler().fit(x["inner"])
    tried, fitted = {}, {}
    for c in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            fitted[c] = LogisticRegression(C=c, solver="lbfgs", max_iter=20_000, tol=1e-6).fit(
                scaler.transform(x["inner"]), y["inner"]
            )
        tried[c] = float(fitted[c].score(scaler.transform(x["outer"]), y["outer"]))
    best = max(tried, key=lambda c: (tried[c], -c))
    right = (fitted[best].predict(scaler.transform(x["test"])) == y["test"]).astype(float)
    return {"outer": {str(c): v for c, v in tried.items()}, "C": best, "test": right.mean()}, right


def fine_tune(data: tuple[Tensor, Tensor], lr: float, seed: int, epochs: int) -> nn.Module:
    """Every parameter trained with AdamW, warm-up and cosine decay."""
    images, labels = data
    model = build(seed)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    per_epoch = len(images) // BATCH
    total = epochs * per_epoch
    warm_up = total // 10
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * max(0, s - warm_up) / (total - warm_up)))),
    )
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    return model


def interval(difference: np.ndarray, seed: int, draws: int = 10_000) -> list[float]:
    """95 % percentile bootstrap interval of a mean over samples."""
    generator = np.random.default_rng(seed)
    index = generator.integers(0, len(difference), (draws, len(difference)))
    return [float(v) for v in np.percentile(difference[index].mean(1), [2.5, 97.5])]


def main() -> None:
    """Run both contenders and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    splits = read_splits(args.seed)
    probed, probe_hits = probe(splits)
    print(f"linear probe: C {probed['C']}, test {probed['test']:.4f}", flush=True)

    tried: dict[float, float] = {}
    models: dict[float, nn.Module] = {}
    for lr in RATES:
        models[lr] = fine_tune(splits["inner"], lr, args.seed, args.epochs)
        tried[lr] = float(hits(models[lr], *splits["outer"]).mean())
        print(f"full fine-tuning: lr {lr:g}, outer {tried[lr]:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    best = max(tried, key=lambda lr: (tried[lr], -lr))
    seeds = [args.seed, args.seed + 1, args.seed + 2]
    tuned = [models[best]] + [fine_tune(splits["inner"], best, s, args.epochs) for s in seeds[1:]]
    full_hits = np.stack([hits(model, *splits["test"]) for model in tuned])

    difference = full_hits.mean(0) - probe_hits
    low, high = interval(difference, args.seed)
    result = {
        "model": MODEL,
        "data": "digits",
        "sizes": {k: len(labels) for k, (_, labels) in splits.items()},
        "seed": args.seed,
        "linear_probe": probed,
        "full_fine_tuning": {
            "outer": {f"{lr:g}": v for lr, v in tried.items()},
            "lr": best,
            "epochs": args.epochs,
            "batch_size": BATCH,
            "seeds": seeds,
            "test": [float(v) for v in full_hits.mean(1)],
            "test_mean": float(full_hits.mean()),
        },
        "difference": {"mean": float(difference.mean()), "interval_95": [low, high]},
        "versions": {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__},
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"full {full_hits.mean():.4f}, difference {difference.mean():.4f} [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
