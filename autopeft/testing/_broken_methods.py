"""Methods that break one law each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.methods._axis import along
from autopeft.methods.lora import LoRA, LoRAAdapter

__all__ = ["BROKEN"]


class _NotIdentity(LoRA):
    """Forgets to start one factor at zero (as SPT's released code does)."""

    __slots__ = ()

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoRAAdapter:
        adapter = LoRA.build(self, site, option, host, generator)
        with torch.no_grad():
            adapter.B.fill_(0.1)
        return adapter


class _Underpriced(LoRA):
    """Prices only one of the factors."""

    __slots__ = ()

    def cost(self, site: Site, size: int) -> Cost:
        return Cost.plain(size * site.out_features, entries=site.n_weight)


class _Modest(LoRA):
    """Says that it cannot be merged, and can."""

    __slots__ = ()

    def mergeable(self, site: Site) -> bool:
        return False


class _TwiceTheSame(LoRA):
    """Offers one size twice."""

    __slots__ = ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        sizes = LoRA.sizes(self, site)
        return (*sizes[:1], *sizes)


class _Dead(LoRA):
    """Cuts one factor off from the loss."""

    __slots__ = ()

    class Part(LoRAAdapter):
        def branch(self, x: Tensor) -> Tensor:
            return self.expand(self.contract(x, self.A.detach()), self.B)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoRAAdapter:
        return _Dead.Part(site, host, option.size, 1.0, generator)


class _WrongMerge(LoRA):
    """Forgets the scale when it merges."""

    __slots__ = ()

    class Part(LoRAAdapter):
        def delta(self) -> dict[str, Tensor]:
            return {"weight": 2 * LoRAAdapter.delta(self)["weight"]}

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoRAAdapter:
        return _WrongMerge.Part(site, host, option.size, 1.0, generator)


class _Forgetful(LoRA):
    """Draws a frozen factor from the seed and does not save it."""

    __slots__ = ()

    class Part(LoRAAdapter):
        def __init__(self, site: Site, host: nn.Module, rank: int, generator: torch.Generator) -> None:
            super().__init__(site, host, rank, 1.0, generator)
            drawn = self.A.detach()
            del self.A
            self.register_buffer("A", drawn, persistent=False)

    def cost(self, site: Site, size: int) -> Cost:
        return Cost.plain(size * site.out_features, entries=site.n_weight)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoRAAdapter:
        return _Forgetful.Part(site, host, option.size, generator)


class _Trespasser(LoRA):
    """Claims the weight and changes the bias as well."""

    __slots__ = ()

    class Part(LoRAAdapter):
        def branch(self, x: Tensor) -> Tensor:
            added = LoRAAdapter.branch(self, x)
            return added + along(self.B.sum(1), x.ndim, self.site.channel_axis) if self.site.has_bias else added

        def delta(self) -> dict[str, Tensor]:
            change = LoRAAdapter.delta(self)
            return {**change, "bias": self.B.sum(1)} if self.site.has_bias else change

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoRAAdapter:
        return _Trespasser.Part(site, host, option.size, 1.0, generator)


class _Careless(LoRA):
    """Draws from the global random state."""

    __slots__ = ()

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoRAAdapter:
        adapter = LoRA.build(self, site, option, host, generator)
        with torch.no_grad():
            adapter.A.copy_(0.1 * torch.randn(adapter.A.shape))
        return adapter


class _Pessimist(LoRA):
    """Promises less for more."""

    __slots__ = ()

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        return tuple(1.0 / size for size in sizes)


BROKEN: dict[str, Callable[[], Method]] = {
    "test_identity_at_step_0": _NotIdentity,
    "test_built_parameters_number_the_cost": _Underpriced,
    "test_sizes_increase": _TwiceTheSame,
    "test_gradients_flow": _Dead,
    "test_merged_equals_unmerged": _WrongMerge,
    "test_mergeable_is_known_before_building": _Modest,
    "test_loaded_into_a_fresh_base": _Forgetful,
    "test_only_claimed_places_change": _Trespasser,
    "test_build_is_deterministic": _Careless,
    "test_gains_grow_with_size": _Pessimist,
}
"""Law to a method that breaks it and no other."""
