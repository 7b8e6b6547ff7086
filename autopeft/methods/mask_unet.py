"""MaskUNet: a binary mask on attention weights that follows the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._grouped import Grouped, member_signal
from autopeft.methods._host import host_tensor, is_plain, new_parameter
from autopeft.methods._masked import MaskedChange
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import energy
from autopeft.methods.base import Adapter, Shared

__all__ = ["MaskUNet", "MaskUNetAdapter", "MaskUNetShared"]


@dataclass(frozen=True, slots=True)
class MaskUNet(Grouped):
    """`W * m(x)`: each sample switches off entries of a block's attention weights.

    MaskUNet (Wang et al., 2025, arXiv 2505.03097). One generator per block pools the tokens that enter its attention to
    C channels and maps them to a small map

        map(x) = relu(W_2 relu(W_1 mean(x) + b_1) + b_2),    (m, m),

    which two expanders per Linear (out k, in d) turn into logits `(R map + r) Q^T + q` of the weight's shape, R (k, m)
    and Q (d, m). The mask is a hard Gumbel-sigmoid of them: in training logistic noise is added and the gradient goes
    straight through the step; in evaluation there is no noise, and equal inputs give equal masks. `size` is m; the
    paper's f = 4 means m = C / 4. It costs `k (m + 1) + d (m + 1)` per Linear, and `C h + h + (h + 1) m^2` per block
    with h the hidden width. Where attention runs in windows, each window is a sample.

    The logits start at 5: in evaluation all entries are on, an exact identity, while in training sigmoid(-5) = 0.7 %
    of them are off at a time. For that Q is zero and everything else is drawn. The released start, with W_2 and all
    expanders zero, has a gradient of zero in W_1, W_2 and R that stays zero, so that the mask would never see the
    input. Diffusion hosts also add an embedding of the time step to the pooled channels; image classifiers have none.

    A mask of the input is no change of the weight, so that nothing can be merged.

    Attributes:
        conditioning: what the mask follows: `sample`, the tokens of the image.
        hidden: width of the generator's hidden layer.
        temperature: of the Gumbel-sigmoid.
        threshold: an entry is on where the sigmoid is above it.
        start: where r and q, and so the logits, start.

    Raises:
        UsageError: for a value out of range, or a start that would switch weights off.
    """

    conditioning: Literal["sample"] = "sample"
    hidden: int = 64
    temperature: float = 1.0
    threshold: float = 0.5
    start: float = 5.0
    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        if self.conditioning != "sample":
            raise UsageError(f"conditioning of mask_unet must be 'sample', got {self.conditioning!r}")
        if self.hidden < 1:
            raise UsageError(f"hidden of mask_unet must be at least 1, got {self.hidden}")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature of mask_unet must be above 0 and finite, got {self.temperature}")
        if not 0 < self.threshold < 1:
            raise UsageError(f"threshold of mask_unet must lie between 0 and 1, got {self.threshold}")
        if not math.isfinite(self.start) or self.start <= self.temperature * math.log(
            self.threshold / (1 - self.threshold)
        ):
            raise UsageError(
                f"start of mask_unet must be a finite logit above the threshold, or training would begin with weights "
                f"switched off; got start {self.start}, threshold {self.threshold}, temperature {self.temperature}"
            )

    def members(self, site: Site) -> tuple[Site, ...]:
        """The attention's Linears of a group `block:K`."""
        if site.kind != "group" or not site.name.startswith("block:"):
            return ()
        return tuple(m for m in site.members if m.kind == "linear" and m.role.startswith("attn."))

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1, 2, 4, ... below C / 4, and C / 4 itself, C being the channels that enter the attention."""
        members = self.members(site)
        largest = members[0].in_features // 4 if members else 0
        return tuple(sorted({*powers_of_two(largest), largest} - {0}))

    def cost(self, site: Site, size: int) -> Cost:
        """`sum (k + d)(m + 1) + C h + h + (h + 1) m^2`; any entry of the Linears may be switched off."""
        m = check_size("mask_unet", site, size, self.sizes(site))
        members = self.members(site)
        generator = (members[0].in_features + 1) * self.hidden + (self.hidden + 1) * m**2
        expanders = sum((s.out_features + s.in_features) * (m + 1) for s in members)
        entries = sum(s.n_weight for s in members)
        return Cost.plain(generator + expanders, entries=entries, tensors=4 + 4 * len(members))

    def mergeable(self, site: Site) -> bool:
        """No: the mask is another one for every input."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> MaskUNetShared:
        """Generator and first expanders drawn as a Linear's weights, second ones zero, their biases at `start`."""
        m = check_size("mask_unet", site, option.size, self.sizes(site))
        return MaskUNetShared(site, self, host, m, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """`(m + 1) / k` of the signals' energy per Linear.

        At the start the logits of an input column move in the span of m rows drawn blindly and a constant: m + 1
        of k directions, and the expectation is taken over them. That masks only switch off is not counted.
        """
        members = [(energy(member_signal(evidence, s)), s.out_features) for s in self.members(site)]
        return tuple(sum(total * min(1.0, (m + 1) / k) for total, k in members) for m in sizes)


class MaskUNetShared(Shared):
    """A block's generator: `inner` (h, C), `inner_bias`, `outer` (m^2, h), `outer_bias`."""

    def __init__(self, site: Site, method: MaskUNet, model: nn.Module, size: int, generator: torch.Generator) -> None:
        super().__init__(site)
        self.size = size
        members = method.members(site)
        channels, h = members[0].in_features, method.hidden
        self.inner, self.inner_bias = (new_parameter(model, t) for t in _layer(h, channels, generator))
        self.outer, self.outer_bias = (new_parameter(model, t) for t in _layer(size**2, h, generator))
        self._map: Tensor | None = None
        for member in members:
            host = model.get_submodule(member.module)
            first, last = member is members[0], member is members[-1]
            self.add(MaskUNetAdapter(member, host, self, method, generator, first, last))

    def look(self, x: Tensor) -> None:
        """Make the map of what enters the attention.

        Args:
            x: (samples, ..., C).
        """
        pooled = x.flatten(1, -2).mean(1) if x.ndim > 2 else x
        hidden = F.relu(F.linear(pooled.to(self.inner.dtype), self.inner, self.inner_bias))
        self._map = F.relu(F.linear(hidden, self.outer, self.outer_bias)).view(-1, self.size, self.size)

    def take(self, site: Site, last: bool) -> Tensor:
        """The map (samples, m, m) that was made in this pass; the last member lets go of it.

        Raises:
            UsageError: when the Linears of the attention are called in another order than they are listed in.
        """
        seen = self._map
        if seen is None:
            raise UsageError(
                f"{site.name} was called before the first Linear of its attention; mask_unet cannot be used on "
                f"{self.site.name}"
            )
        if last:
            self._map = None
        return seen


class MaskUNetAdapter(Adapter):
    """Expanders `rows` (k, m), `rows_bias` (k,), `columns` (d, m), `columns_bias` (d,); the frozen weight beside."""

    weight: Tensor

    def __init__(
        self,
        site: Site,
        host: nn.Module,
        shared: MaskUNetShared,
        method: MaskUNet,
        generator: torch.Generator,
        first: bool,
        last: bool,
    ) -> None:
        if not is_plain(host):
            raise UsageError(f"mask_unet masks the weight of a plain Linear; {site.name} is a {type(host).__name__}")
        super().__init__(site, ("weight",), "branch", "its mask is another one for every input")
        self._shared = (shared,)
        self._first, self._last = first, last
        self._temperature, self._threshold = method.temperature, method.threshold
        k, d, m = site.out_features, site.in_features, shared.size
        self.rows = new_parameter(host, _layer(k, m, generator)[0])
        self.rows_bias = new_parameter(host, torch.full((k,), method.start))
        self.columns = new_parameter(host, torch.zeros(d, m))
        self.columns_bias = new_parameter(host, torch.full((d,), method.start))
        self.register_buffer("weight", host_tensor(site, host, site.parameter).detach(), persistent=False)

    def branch(self, x: Tensor) -> Tensor:
        """What masking the weight takes away from the output."""
        (shared,) = self._shared
        if self._first:
            shared.look(x)
        seen = shared.take(self.site, self._last)
        logits = (self.rows @ seen + self.rows_bias[:, None]) @ self.columns.T + self.columns_bias
        if self.training:
            # The difference of two Gumbel variables is logistic; 0 and 1 themselves have no finite logit.
            uniform = torch.rand_like(logits).clamp_(torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps)
            logits = logits + torch.logit(uniform)
        flat = x.reshape(len(x), -1, x.shape[-1])
        y: Tensor = MaskedChange.apply(flat, logits, self.weight, self._temperature, self._threshold)
        return y.view(*x.shape[:-1], -1)


def _layer(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight and bias drawn as torch draws those of a Linear: uniform within 1 / sqrt(inputs)."""
    bound = inputs**-0.5
    weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(outputs).uniform_(-bound, bound, generator=generator)
