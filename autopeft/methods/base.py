"""What every `Method.build` returns: trainable tensors and the ways they act on their host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from autopeft.core.site import Site, Slot

__all__ = ["Adapter", "Form"]

Form = Literal["branch", "swap", "output"]
"""How a backend runs an adapter: `branch` adds to the host's output, `swap` runs the host with changed tensors,
`output` maps the host's output."""


class Adapter(nn.Module):
    """Trainable tensors for one site, and what they do there.

    An adapter never holds its host: the backend calls it with what it needs. It acts in one of three forms, chosen when
    it is built because some hosts (weight-standardised convolutions, norms that contain an activation) are not linear
    in their weight:

    - `branch`: the host's output gains `branch(x)`. No dense change of the weight is made. Linear and Conv2d.
    - `swap`: the host runs with its tensors replaced by `merge(tensors)`. Norms, layer scales, tokens, and every Linear
      or Conv2d whose forward is not the plain one.
    - `output`: the host's output `y` becomes `transform(y)`.

    On a row slice of a fused projection everything refers to the slice's rows alone: `branch` returns those rows,
    `transform` maps them, `merge` is given them.

    Parameters are float32 (float64 on a float64 host) whatever the host's precision. Everything else that must be saved
    is a persistent buffer; what can be computed again from the host is a buffer that is not persistent.

    Attributes:
        site: where it acts.
        slots: the slots of the site it occupies.
        form: how the backend runs it.
        obstacle: why it cannot be merged into the host's tensors; empty when it can.
    """

    def __init__(self, site: Site, slots: tuple[Slot, ...], form: Form, obstacle: str = "") -> None:
        super().__init__()
        self.site = site
        self.slots = slots
        self.form: Form = form
        self.obstacle = obstacle

    @property
    def mergeable(self) -> bool:
        """Whether the host's tensors can be changed so that the plain host gives the same output."""
        return not self.obstacle

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the output rows of the host; form `branch` only.

        Args:
            x: the host's input, (..., in_features) for Linear, (batch, channels, height, width) for Conv2d.

        Returns:
            A tensor that broadcasts to the site's rows of the host's output.
        """
        raise NotImplementedError(f"{type(self).__name__} of {self.site.name} has no branch, its form is {self.form!r}")

    def transform(self, y: Tensor) -> Tensor:
        """The host's output rows as they leave the site; form `output` only.

        Args:
            y: output rows, of any rank; the channels lie on the site's `channel_axis`.

        Returns:
            A tensor of the shape and dtype of `y`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} of {self.site.name} maps no output, its form is {self.form!r}"
        )

    def delta(self) -> dict[str, Tensor]:
        """Dense additive change of the site's tensors, with gradient.

        Returns:
            Slot (`weight`, `bias`, `tokens`) to a tensor of the stored shape; empty when the change is not additive.
        """
        return {}

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The site's tensors with this adapter in them, with gradient, in the dtype of `tensors`.

        Args:
            tensors: slot (`weight`, `bias`, `tokens`) to the site's tensor (its rows, for a slice).

        Returns:
            The same slots; those that are not touched hold the same tensor objects.
        """
        merged = dict(tensors)
        for slot, change in self.delta().items():
            merged[slot] = tensors[slot] + change.to(tensors[slot].dtype)
        return merged

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """`(down, up)` with weight change `up @ down` on the flattened weight, for formats that know LoRA alone.

        Returns:
            `down` (r, in_features) and `up` (out_features, r) without gradient, scale included in `up`; None when the
            adapter is not a low-rank change.
        """
        return None

    def extra_repr(self) -> str:
        """Site, slots and form, for `print(model)`."""
        return f"{self.site.name}, {'+'.join(self.slots)}, {self.form}"
