"""Denoisers small enough for every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["denoiser_config", "tiny_denoiser", "tiny_pipeline"]

_SIZE = 8


def denoiser_config(**scheduler: Any) -> dict[str, Any]:
    """What a task is told of a tiny denoiser of gray pixels without a text encoder.

    Args:
        scheduler: settings of the scheduler besides its 100 steps.
    """
    return {
        "input_size": (1, _SIZE, _SIZE),
        "interpolation": "bicubic",
        "mean": (0.5,),
        "std": (0.5,),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "diffusion": {
            "folder": "nowhere",
            "scheduler": {"num_train_timesteps": 100, **scheduler},
            "latent": 1,
            "text": False,
        },
    }


def tiny_denoiser(kind: str = "unet", labels: int | None = 5, seed: int = 0, channels: int = 1) -> nn.Module:
    """A denoiser of diffusers for images (channels, 8, 8).

    Args:
        kind: `unet` (UNet2DModel), `conditional` (UNet2DConditionModel, looks at texts of width 8), `dit`
            (DiTTransformer2DModel, always told a class) or `pixart` (PixArtTransformer2DModel, texts of width 12).
        labels: rows of the table of labels of a `unet`; None for one that is not told a class. One less is the number
            of classes of a `dit`.
        seed: seed of the weights; the caller's random state is left alone.
        channels: of the images.

    Returns:
        The model in evaluation mode, on the CPU, in float32.
    """
    import diffusers

    down = {"in_channels": channels, "out_channels": channels, "sample_size": _SIZE}
    unet = {**down, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    transformer = {**down, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 1}
    builders: dict[str, tuple[Any, dict[str, Any]]] = {
        "unet": (
            diffusers.UNet2DModel,
            {
                **unet,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 8,
                "num_class_embeds": labels,
            },
        ),
        "conditional": (
            diffusers.UNet2DConditionModel,
            {
                **unet,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "cross_attention_dim": 8,
                "attention_head_dim": 4,
            },
        ),
        "dit": (diffusers.DiTTransformer2DModel, {**transformer, "num_embeds_ada_norm": (labels or 2) - 1}),
        "pixart": (
            diffusers.PixArtTransformer2DModel,
            {**transformer, "out_channels": 2 * channels, "cross_attention_dim": 16, "caption_channels": 12},
        ),
    }
    build, arguments = builders[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build(**arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                # Some of diffusers' layers start at zero, which would hide what lies before them.
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def tiny_pipeline(folder: Path, kind: str = "unet", labels: int | None = 11) -> Path:
    """Write a tiny denoiser and its scheduler as diffusers lays a pipeline out; the folder is returned."""
    import diffusers

    model: Any = tiny_denoiser(kind, labels)
    model.save_pretrained(folder / ("unet" if kind in ("unet", "conditional") else "transformer"))
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(folder / "scheduler")
    return folder
