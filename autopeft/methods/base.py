"""What every `Method.build` returns: trainable tensors and the ways they act on their host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError

__all__ = ["Adapter", "Form", "Part", "Role", "Shared"]

Form = Literal["swap", "stand_in", "input", "branch", "output", "wrap"]
"""How a backend runs an adapter: `swap` runs the host with changed tensors, `stand_in` runs in the host's place,
`input` maps the host's input, `branch` adds to the host's output, `output` maps the host's output, `wrap` runs the
host itself."""

Role = Literal["down", "up", "core", "dense", "entries", "vector"]
"""What a trained tensor does in the change of its host, for rules of learning rates: `down` sums over all inputs to a
few features, `up` spreads a few features over all outputs, `core` maps few to few, `dense` is a whole weight, `entries`
are single entries of one, `vector` is one number per channel or token."""


class Part(nn.Module):
    """What one option trains: an `Adapter` on one site, or a `Shared` on several."""

    rate_roles: ClassVar[Mapping[str, Role]] = MappingProxyType({})
    """Roles of its parameters, by name, where the method's family and the shapes would tell them wrongly."""

    rank_in_scale: bool = False
    """Whether a factor of its own makes its steps alike at every rank, so that no learning rate must do it again."""

    moving: ClassVar[frozenset[str]] = frozenset()
    """Names of persistent buffers that training changes, as they appear in the state dict."""

    recomputed: frozenset[str] = frozenset()
    """Names of buffers that are not saved because a decomposition of the host's weight, or a seed, gives them again:
    exports say what they were, so that another machine's result can be compared."""

    patience: int = 2
    """Training steps within which every parameter has had a gradient that is not zero; more where a step trains a
    random part of them."""

    site: Site
    obstacle: str

    def stored(self) -> dict[str, Tensor]:
        """What must be saved in the end; what the option's cost counts as stored. The state dict, unless packed."""
        return dict(self.state_dict())

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `stored` gave, with equal outputs.

        Raises:
            UsageError: for a missing, unknown or misshapen tensor.
        """
        mine = self.state_dict()
        if set(mine) != set(tensors) or any(mine[name].shape != tensors[name].shape for name in mine):
            raise UsageError(
                f"{type(self).__name__} holds {', '.join(f'{n} {tuple(t.shape)}' for n, t in mine.items())}; the file "
                f"has {', '.join(f'{n} {tuple(t.shape)}' for n, t in tensors.items())}"
            )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])

    def advance(self, step: int, total: int) -> bool:
        """Told before every training step; must give the same when told again after a restart.

        Args:
            step: steps taken so far.
            total: steps of the whole schedule.

        Returns:
            Whether the optimizer's state of its parameters must be dropped.
        """
        return False

    def penalty(self) -> Tensor | None:
        """A scalar with gradient that the method adds to the loss, its weight included; None for nothing."""
        return None


class Adapter(Part):
    """Trainable tensors for one site, and what they do there.

    An adapter never holds its host: the backend calls it with what it needs. It acts in one of six forms, chosen when
    it is built because some hosts (weight-standardised convolutions, norms that contain an activation) are not linear
    in their weight:

    - `swap`: the host runs with its tensors replaced by `merge(tensors)`. Norms, layer scales, tokens, and every Linear
      or Conv2d whose forward is not the plain one.
    - `stand_in`: `around` runs in the place of the host's own forward, inside of everything else on the host.
    - `input`: the host is given `receive(x)` in place of its first argument.
    - `branch`: the host's output gains `branch(x)`. No dense change of the weight is made. Linear, Conv2d, and residual
      branches.
    - `output`: the host's output `y` becomes `transform(y)`.
    - `wrap`: `around` runs the host, with all of the above in it.

    On a row slice of a fused projection everything refers to the slice's rows alone: `branch` returns those rows,
    `transform` maps them, `merge` is given them.

    Parameters are float32 (float64 on a float64 host) whatever the host's precision. Everything else that must be saved
    is a persistent buffer; what can be computed again from the host is a buffer that is not persistent.

    Attributes:
        site: where it acts.
        slots: the slots of the site it occupies.
        form: how the backend runs it.
        obstacle: why it cannot be merged into the host's tensors; empty when it can.
        reads_entry: on a residual branch, whether `branch` is given the input of the norm in front of the host (the
            residual stream as it is) in place of the host's own.
    """

    reads_entry: ClassVar[bool] = False

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

    def receive(self, x: Tensor) -> Tensor:
        """What the host is given in place of its input; form `input` only. Of the shape and dtype of `x`."""
        raise NotImplementedError(f"{type(self).__name__} of {self.site.name} maps no input, its form is {self.form!r}")

    def around(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run the host; forms `wrap` and `stand_in` only.

        Args:
            run: the host's forward with the adapters of the other forms in it, for `stand_in` its own forward alone;
                keyword arguments are bound already.
            args: the host's positional arguments.

        Returns:
            What leaves the host.
        """
        raise NotImplementedError(f"{type(self).__name__} of {self.site.name} wraps nothing, its form is {self.form!r}")

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


class Shared(Part):
    """Trainable tensors that several sites share, and one adapter per site.

    Parameters and buffers that are shared belong to this module. The members read them through a plain reference
    (`self._shared = (shared,)`, a tuple, so that torch does not register it) or hold tensors of their own.

    Attributes:
        site: the group.
        members: name of a member's site (`.` as `:`) to its adapter.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.members = nn.ModuleDict()

    def add(self, adapter: Adapter) -> None:
        """Take a member in."""
        self.members[adapter.site.name.replace(".", ":")] = adapter

    def adapters(self) -> tuple[Adapter, ...]:
        """The members, in the order they were added."""
        return tuple(m for m in self.members.values() if isinstance(m, Adapter))

    @property
    def obstacle(self) -> str:  # type: ignore[override]  # read from the members, never set
        """Why it cannot be merged: the first member's reason."""
        return next((a.obstacle for a in self.adapters() if a.obstacle), "")

    @property
    def mergeable(self) -> bool:
        """Whether every member can be merged."""
        return not self.obstacle

    def extra_repr(self) -> str:
        """Group and number of sites, for `print(model)`."""
        return f"{self.site.name}, {len(self.members)} sites"
