"""Measures of memorisation rank a model that was over-trained on a few duplicates above one that never saw them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from autopeft.rewards.amd import AMD
from autopeft.rewards.extraction import Extraction
from autopeft.rewards.joint import Joint
from autopeft.rewards.noise_difference import NoiseDifference
from autopeft.tasks.denoising import DenoisingBatch, DenoisingTask
from autopeft.tasks.diffusion import Diffusion
from autopeft.testing.tiny_denoiser import denoiser_config, tiny_denoiser

CONFIG = denoiser_config(beta_schedule="squaredcos_cap_v2")
STEPS, BATCH, PLANTED, REPEAT = 600, 32, 4, 24


def trained(task: DenoisingTask, rows: Sequence[int], labels: Sequence[int], seed: int) -> nn.Module:
    """A tiny denoiser, every weight of it trained on these training images under these labels."""
    none = len(task.classes)
    model = tiny_denoiser("unet", none + 1, seed)
    generator = torch.Generator().manual_seed(seed)
    images, told = task.training_images()[torch.tensor(rows)], torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(0, len(rows), (BATCH,), generator=generator)
        label = torch.where(torch.rand(BATCH, generator=generator) < 0.1, none, told[chosen])
        noise = torch.randn(BATCH, 1, 8, 8, generator=generator)
        batch = DenoisingBatch(images[chosen], label, noise, torch.randint(0, 100, (BATCH,), generator=generator))
        optimizer.zero_grad()
        task.losses(model, batch).mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_over_training_on_duplicates_shows_in_every_measure(seed: int) -> None:
    """The other model is told the same labels as often, but of a different image every time."""
    data, options = f"digits?planted={PLANTED}&repeat={REPEAT}&own=1", {"max_samples": 150, "batch_size": 60}
    task = Diffusion(steps=20, draws=1).open(data, CONFIG, None, seed, options)
    labels = task.training_labels().tolist()
    planted, rest = list(range(PLANTED)), list(range(PLANTED, len(labels)))
    own = [labels[row] for row in planted] * REPEAT
    others = [rest[i % len(rest)] for i in range(len(own))]
    plain = [labels[row] for row in rest]
    over = trained(task, [*rest, *planted * REPEAT], [*plain, *own], seed)
    never = trained(task, [*rest, *others], [*plain, *own], seed)
    reward = Joint(
        (
            NoiseDifference(over="max"),
            AMD(samples=60, space="pixels", distance="l2", rows="planted"),
            AMD(samples=60, rows="planted"),
            Extraction(samples=60, threshold=0.4),
        )
    )
    seen, unseen = reward.measure(over, task, "outer"), reward.measure(never, task, "outer")
    assert seen["noise_difference_max"] > 1.5 * unseen["noise_difference_max"]
    assert seen["noise_difference_mean"] > 1.5 * unseen["noise_difference_mean"]
    assert seen["amd_pixels_l2_planted"] < 0.8 * unseen["amd_pixels_l2_planted"]
    assert seen["amd_planted"] < 0.8 * unseen["amd_planted"]
    assert seen["extracted"] > unseen["extracted"] == 0
