"""How much the condition moves the predicted noise of training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args, runtime_checkable

from autopeft.errors import UsageError
from autopeft.rewards._measured import Measured
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio, borrowed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NoiseDifference", "Over", "Rows"]

Rows = Literal["planted", "all"]
Over = Literal["max", "mean"]


@runtime_checkable
class _Conditioned(Protocol):
    """A task whose model is told a class or a text."""

    def noise_difference(
        self, model: nn.Module, rows: Sequence[int] | None = None, draws: int = 4, seed: int = 0
    ) -> Tensor:
        """`|eps(x, c) - eps(x, nothing)|_2` of training images at fixed draws of noise and timestep, (n, draws)."""
        ...


@dataclass(frozen=True, slots=True)
class NoiseDifference(Measured):
    """The norm of what the condition adds to the predicted noise, on training images.

    Large where the model has tied an image to its condition (Wen et al., ICLR 2024), MemControl's proxy of
    memorisation. Its code takes one draw and the largest value of each batch; here draws are fixed and shared by all
    trials, averaged per image, and the maximum or mean is over all images, so that no batch size enters. Both are
    measured, as `noise_difference_max` and `noise_difference_mean`; `over` says which one is the goal.

    Attributes:
        over: `max` or `mean`.
        draws: of noise and timestep, per image.
        seed: of the draws.
        rows: `planted` looks at the images that the task repeats, where it repeats some; `all` at every one.
    """

    over: Over = "max"
    draws: int = 4
    seed: int = 0
    rows: Rows = "planted"

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        for name, known in (("over", get_args(Over)), ("rows", get_args(Rows))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.draws < 1 or self.seed < 0:
            raise UsageError(f"draws must be at least 1 and the seed at least 0, got {self.draws} and {self.seed}")

    @property
    def metric(self) -> str:
        """`noise_difference_max` or `noise_difference_mean`."""
        return f"noise_difference_{self.over}"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says.

        Raises:
            UsageError: when the task's model is told no condition.
        """
        task = studio.task
        if not isinstance(task, _Conditioned):
            raise UsageError(
                f"{type(task).__name__} has no `noise_difference`; this reward needs a task such as diffusion, whose "
                f"model is told a class or a text"
            )
        planted = getattr(task, "planted", ()) if self.rows == "planted" else ()
        rows = tuple(planted) or None
        with borrowed(studio.model):
            norms = task.noise_difference(studio.model, rows, self.draws, self.seed).detach().double().cpu()
        if norms.ndim != 2 or not len(norms):
            raise UsageError(f"noise_difference gave a tensor of shape {tuple(norms.shape)}, not (images, draws)")
        images = norms.mean(dim=1)
        return {"noise_difference_max": float(images.max()), "noise_difference_mean": float(images.mean())}
