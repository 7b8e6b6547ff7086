"""Generative rewards on the diffusion task itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.config.plugin import Plugin
from autopeft.errors import UsageError
from autopeft.rewards._copies import amd, extracted
from autopeft.tasks.denoising import DenoisingTask
from autopeft.tasks.diffusion import Diffusion
from autopeft.testing.tiny_denoiser import denoiser_config, tiny_denoiser

CONFIG = denoiser_config()


def opened(data: str = "digits?planted=2&repeat=5", folder: Path | None = None) -> DenoisingTask:
    options = {"max_samples": 60, "batch_size": 16}
    return Diffusion(steps=3, draws=1).open(data, CONFIG, folder, 0, options)


def test_every_part_of_a_joint_reward_is_measured() -> None:
    task, model = opened(), tiny_denoiser("unet", 11).train()
    parts = [
        {"type": "fid", "samples": 12},
        {"type": "kid", "samples": 12},
        {"type": "amd", "samples": 12, "space": "pixels"},
        {"type": "extraction", "samples": 12},
        {"type": "noise_difference", "draws": 2},
        "denoising_loss",
        {"type": "forgetting", "source": "digits", "task": {"type": "diffusion", "draws": 1}, "max_samples": 40},
    ]
    reward = Plugin("rewards").read({"type": "joint", "parts": parts})
    state = torch.get_rng_state()
    found = reward.measure(model, task, "outer")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    metrics = {**task.evaluate(model, "outer"), **found}
    assert set(reward.names) <= set(metrics)
    images = task.sample(model, 12, 0)
    assert found["amd_pixels"] == pytest.approx(amd(images, task.training_images()))
    assert found["extracted"] == extracted(images, task.training_images(), 0.2)
    norms = task.noise_difference(model, (0, 1), 2, 0).double().mean(1)
    assert found["noise_difference_max"] == pytest.approx(float(norms.max()))
    assert reward.watched == "denoising_loss" in task.evaluate(model, "outer")


def test_the_distance_to_planted_images_of_what_is_made_for_their_conditions() -> None:
    task, model = opened("digits?planted=2&repeat=5&own=1"), tiny_denoiser("unet", 13)
    reward = Plugin("rewards").read(
        {"type": "amd", "samples": 5, "space": "pixels", "distance": "l2", "rows": "planted"}
    )
    images = task.sample(model, 5, 0, torch.tensor([10, 11, 10, 11, 10]))
    apart = (images[:, None] - task.training_images()[None, :2]).square().mean((2, 3, 4)).sqrt()
    found = reward.measure(model, task, "outer")
    assert reward.names == ("amd_pixels_l2_planted",)
    assert found["amd_pixels_l2_planted"] == pytest.approx(float(apart.min(1).values.mean()), rel=1e-5)
    with pytest.raises(UsageError, match="the task has none"):
        reward.measure(tiny_denoiser("unet", 11), opened("digits"), "outer")


def test_trials_are_judged_on_the_way_by_what_points_where_the_goal_points() -> None:
    """A denoising loss stands for FID; a small one would speak for memorisation and not against it."""
    for first, watched in (
        ({"type": "fid", "samples": 12}, "denoising_loss"),
        ("denoising_loss", "denoising_loss"),
        ({"type": "amd", "samples": 12}, None),
        ("noise_difference", None),
        ({"type": "extraction", "samples": 12}, None),
        ("parameters", None),
    ):
        assert Plugin("rewards").read({"type": "joint", "parts": [first, {"type": "kid", "samples": 12}]}).watched == (
            watched
        )


def test_a_model_that_gives_its_training_images_back_is_caught() -> None:
    class Thief(DenoisingTask):
        def sample(self, model: Any, n: int, seed: int, *_: Any, **__: Any) -> torch.Tensor:
            images = self.training_images()
            return images[torch.arange(n) % 3]

    honest = opened()
    thief = opened()
    thief.__class__ = Thief
    model = tiny_denoiser("unet", 11)
    for settings, better in (
        ({"type": "amd", "samples": 12}, max),
        ({"type": "extraction", "samples": 12}, min),
        ({"type": "mifid", "samples": 12, "threshold": 1.0}, min),
    ):
        reward = Plugin("rewards").read(settings)
        values = [reward.measure(model, task, "outer")[reward.names[0]] for task in (honest, thief)]
        if settings["type"] == "mifid":
            values = [reward.measure(model, task, "outer")["mifid_penalty"] for task in (honest, thief)]
        assert better(values) == values[0] != values[1]
