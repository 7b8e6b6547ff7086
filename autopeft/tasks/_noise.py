"""How a denoiser is trained: noise schedules, targets, weights, and the draws that are the same every time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from autopeft.errors import MissingDependency, UsageError

__all__ = ["Prediction", "Schedule", "fixed_draws"]

Prediction = Literal["epsilon", "v_prediction"]
"""What the model's output is: the noise, or the velocity `sqrt(a) noise - sqrt(1 - a) image`."""


class Schedule:
    """A noise schedule of diffusers: `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`, with `a_t` its `alphas_cumprod`.

    Args:
        config: settings of a scheduler of diffusers, as `scheduler_config.json` holds them; absent ones are DDPM's.
        prediction: what the model's output is; the settings' own when None.

    Raises:
        MissingDependency: without diffusers.
        UsageError: for settings that are none, or a prediction that is neither noise nor velocity.
    """

    def __init__(self, config: Mapping[str, Any], prediction: Prediction | None = None) -> None:
        try:
            from diffusers import DDIMScheduler, DDPMScheduler
        except ImportError as error:
            raise MissingDependency("diffusers", "diffusion", "train a diffusion model (task diffusion)") from error
        kind = prediction or config.get("prediction_type", "epsilon")
        if kind not in get_args(Prediction):
            raise UsageError(
                f"a denoiser is trained to predict one of {', '.join(get_args(Prediction))}, got {kind!r}; "
                "set task.prediction"
            )
        self.prediction: Prediction = kind
        self.config = {k: v for k, v in config.items() if not k.startswith("_")} | {"prediction_type": kind}
        try:
            ddpm = DDPMScheduler.from_config(self.config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UsageError(f"the scheduler's settings are none of DDPM's: {error}") from error
        self._ddim = DDIMScheduler
        self.alphas: Tensor = ddpm.alphas_cumprod.float()

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.alphas)

    def noisy(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The images with noise, (b, C, H, W)."""
        signal, spread = self._roots(timesteps, images)
        return signal * images + spread * noise

    def target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should give for the noisy images, (b, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._roots(timesteps, images)
        return signal * noise - spread * images

    def noise_scale(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Factor from a difference of outputs to a difference of predicted noise, (b, 1, 1, 1).

        1 for the noise itself; `noise = sqrt(a) v + sqrt(1 - a) x_t`, so `sqrt(a)` for velocities.
        """
        signal, _ = self._roots(timesteps, like)
        return torch.ones_like(signal) if self.prediction == "epsilon" else signal

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights of the squared error at some timesteps, (b,); all 1 for a gamma of 0.

        Min-SNR-gamma (Hang et al., arXiv 2303.09556, equation 8 and section 3.4): with `snr = a / (1 - a)`,
        `min(snr, gamma) / snr` when noise is predicted and `min(snr, gamma) / (snr + 1)` for velocities.
        """
        if not gamma:
            return torch.ones(len(timesteps), device=timesteps.device)
        a = self.alphas.to(timesteps.device)[timesteps]
        # Written without a quotient by `1 - a` and by the ratio, either of which may be 0 at an end of the schedule.
        if self.prediction == "epsilon":
            return torch.clamp(gamma * (1 - a) / a.clamp_min(torch.finfo(a.dtype).tiny), max=1.0)
        return torch.minimum(a, gamma * (1 - a))

    def sampler(self, steps: int) -> Any:
        """A DDIM scheduler of diffusers for so many steps.

        Raises:
            UsageError: for fewer than one step, or more than there are timesteps.
        """
        if not 1 <= steps <= self.steps:
            raise UsageError(f"sampling takes from 1 to {self.steps} steps, got {steps}")
        known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                 "clip_sample", "clip_sample_range", "rescale_betas_zero_snr", "timestep_spacing", "steps_offset",
                 "thresholding", "dynamic_thresholding_ratio", "sample_max_value")  # fmt: skip
        scheduler = self._ddim(**{key: self.config[key] for key in known if key in self.config})
        scheduler.set_timesteps(steps)
        return scheduler

    def _roots(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas.to(like.device)[timesteps.to(like.device)].view(-1, 1, 1, 1)
        return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)


def fixed_draws(
    names: Sequence[str], shape: tuple[int, ...], timesteps: int, draw: int = 0, draws: int = 1
) -> tuple[Tensor, Tensor]:
    """Noise and timesteps that depend on a sample's name and the number of the draw alone.

    Losses at these draws differ by the models alone: between trials, processes and batch sizes nothing else changes.
    The draws of a sample are stratified: draw `k` of `K` takes its timestep from the `k`-th of `K` equal parts.

    Args:
        names: what each sample is called.
        shape: of one image.
        timesteps: length of the schedule.
        draw: number of the draw.
        draws: how many there are.

    Returns:
        Noise (n, *shape), float32, and timesteps (n,), int64.
    """
    noise, steps = torch.empty(len(names), *shape), torch.empty(len(names), dtype=torch.int64)
    for i, name in enumerate(names):
        digest = hashlib.sha256(f"{draw}/{draws}\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        share = (draw + float(torch.rand((), generator=generator))) / draws
        steps[i] = min(timesteps - 1, math.floor(share * timesteps))
        noise[i] = torch.randn(shape, generator=generator)
    return noise, steps
