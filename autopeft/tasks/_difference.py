"""What the condition adds to the predicted noise of training images, at draws that are the same every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autopeft.tasks._denoise import denoise
from autopeft.tasks._noise import Schedule, fixed_draws

if TYPE_CHECKING:
    from autopeft.tasks.denoising import Images

__all__ = ["Condition", "difference", "drawn", "drawn_pairs"]

Condition = tuple[Tensor | None, Tensor | None]
"""Labels and texts of a batch, on the model's device."""


def difference(
    model: nn.Module, schedule: Schedule, noisy: Tensor, timesteps: Tensor, condition: Condition, empty: Condition
) -> Tensor:
    """`eps(x_t, c) - eps(x_t, empty)`, (b, C, H, W), with gradient.

    Args:
        model: the denoiser.
        schedule: of what its output is.
        noisy: x_t, on the model's device.
        timesteps: (b,), there too.
        condition: c.
        empty: the empty condition.
    """
    given = denoise(model, noisy, timesteps, *condition)
    without = denoise(model, noisy, timesteps, *empty)
    return (given - without) * schedule.noise_scale(timesteps, given)


def drawn(
    part: Images, rows: Sequence[int], schedule: Schedule, draw: int, draws: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noise (n, C, H, W) and timesteps (n,) of some images: by their names, the draw and the seed alone."""
    names = [f"difference {seed} {part.names[row]}" for row in rows]
    return fixed_draws(names, tuple(part.denoised.shape[1:]), schedule.steps, draw, draws)


def drawn_pairs(
    part: Images, rows: Sequence[int], schedule: Schedule, draws: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, noise and timesteps of batches that hold every draw of a row before the next row."""
    pairs = [(row, draw) for row in rows for draw in range(draws)]
    for first in range(0, len(pairs), batch_size):
        now = pairs[first : first + batch_size]
        noise, steps = zip(*(drawn(part, [row], schedule, draw, draws) for row, draw in now), strict=True)
        yield [row for row, _ in now], torch.cat(noise), torch.cat(steps)
