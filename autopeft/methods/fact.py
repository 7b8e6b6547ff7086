"""FacT: one low-rank tensor for all weights of a transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

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
from autopeft.methods._sizes import check_size, half_octaves
from autopeft.methods.base import Adapter, Shared

__all__ = ["FacT", "FacTAdapter", "FacTShared"]

_Form = Literal["tt", "tk"]

_LARGEST = 128
"""Largest rank on offer: 2.5 million parameters on a ViT-B/16, in either form."""


@dataclass(frozen=True, slots=True)
class FacT(Grouped):
    """One trained tensor whose slices are added to all attention and MLP weights.

    FacT (Jie and Deng, 2022, arXiv 2212.03145). Every weight whose sides are multiples of the model's width d is cut
    into d x d slices: a fused qkv projection into 3, an attention's output projection is 1, each Linear of an MLP of
    ratio 4 is 4. All slices of all blocks, n of them, form a tensor (n, d, d), and its change is factored. `tt`, tensor
    train:

        dW_l = scale * U S_l V^T,                 2 d r + n r^2 parameters;

    `tk`, Tucker, in which the cores of the slices are mixtures of r shared ones:

        dW_l = scale * U (sum_k P_lk C_k) V^T,    2 d r + n r + r^3 parameters.

    Here weights are (out, in), so that U is on the side of the outputs. U starts at zero, an exact identity; the other
    factors start as in the released code: V and S uniform as a Linear's weight, C and P by Xavier's rule. The released
    code's dropout between the factors is left out.

    In hierarchical models d is the side of which the sides of most weights are multiples, the largest such; weights
    that do not fit stay as they are. The patch embedding is no part of it.

    Attributes:
        form: `tt` or `tk`.
        scale: the factor s; the paper searches 0.01 to 100 per task.

    Raises:
        UsageError: for an unknown form, or a scale that is not positive and finite.
    """

    form: _Form = "tt"
    scale: float = 1.0
    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        if self.form not in get_args(_Form):
            raise UsageError(f"form of fact must be {' or '.join(get_args(_Form))}, got {self.form!r}")
        if not 0 < self.scale < math.inf:
            raise UsageError(f"scale of fact must be above 0 and finite, got {self.scale}; the paper tries 0.01 to 100")

    def members(self, site: Site) -> tuple[Site, ...]:
        """The attention and MLP weights of group `*` whose sides are multiples of the width."""
        width = self.width(site)
        return tuple(m for m in _candidates(site) if _fits(m, width)) if width else ()

    def width(self, site: Site) -> int:
        """The side d of the slices; 0 where fewer than two weights would be cut."""
        candidates = _candidates(site)
        covered = {d: sum(m.n_weight for m in candidates if _fits(m, d)) for d in {min(m.shape) for m in candidates}}
        best = max(covered, key=lambda d: (covered[d], d), default=0)
        return best if best and sum(_fits(m, best) for m in candidates) > 1 else 0

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Ranks 1, 2, 3, 4, 6, 8, 12, ... up to 128 or the width."""
        return half_octaves(min(self.width(site), _LARGEST))

    def cost(self, site: Site, size: int) -> Cost:
        """`2 d r + n r^2`, or `2 d r + n r + r^3`; changes every entry of the members."""
        r = check_size("fact", site, size, self.sizes(site))
        d, entries = self.width(site), sum(m.n_weight for m in self.members(site))
        n = entries // d**2
        middle = n * r**2 if self.form == "tt" else n * r + r**3
        return Cost.plain(2 * d * r + middle, entries=entries, tensors=3 if self.form == "tt" else 4)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> FacTShared:
        """U zero, the other factors drawn."""
        r = check_size("fact", site, option.size, self.sizes(site))
        return FacTShared(site, host, self, r, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Energy of the signals' tensor (n, d, d) in the leading singular vectors of its modes.

        U and V hold the leading eigenvectors of the slices' summed Gram matrices and, for `tk`, P those of the slices
        seen through U and V of the largest rank on offer: the truncated higher-order singular value decomposition. The
        factors are nested, so larger ranks never capture less.
        """
        d, members = self.width(site), self.members(site)
        left, right = torch.zeros(2, d, d, dtype=torch.float64)
        for member in members:
            for piece in _slices(member_signal(evidence, member), d):
                left += (piece @ piece.T).double()
                right += (piece.T @ piece).double()
        wide = member_signal(evidence, members[0]).dtype
        u, v = (torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :_LARGEST].to(wide) for gram in (left, right))
        held = torch.cat([u.T @ _slices(member_signal(evidence, m), d) @ v for m in members]).double()
        n = len(held)
        if self.form == "tk":
            flat = held.flatten(1)
            mixed: Tensor = torch.linalg.eigh(flat @ flat.T).eigenvectors
            held = (mixed.flip(1).T @ flat).view_as(held)
        total = held.square().cumsum(1).cumsum(2)
        total = total.cumsum(0) if self.form == "tk" else total.sum(0, keepdim=True).expand_as(total)
        return tuple(float(total[min(r, n) - 1, r - 1, r - 1]) for r in sizes)


class FacTShared(Shared):
    """`U` and `V` (d, r) with `S` (n, r, r), or with `C` (r, r, r) and `P` (n, r)."""

    def __init__(self, site: Site, model: nn.Module, method: FacT, rank: int, generator: torch.Generator) -> None:
        super().__init__(site)
        self.form, self.scale = method.form, method.scale
        d, members = method.width(site), method.members(site)
        n = sum(m.n_weight for m in members) // d**2

        def drawn(bound: float, *shape: int) -> nn.Parameter:
            return new_parameter(model, torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.U = new_parameter(model, torch.zeros(d, rank))
        self.V = drawn(d**-0.5, d, rank)
        if method.form == "tt":
            self.S = drawn(rank**-0.5, n, rank, rank)
        else:
            self.C = drawn(math.sqrt(3) / rank, rank, rank, rank)
            self.P = drawn(math.sqrt(6 / (n + rank)), n, rank)
        first = 0
        for member in members:
            self.add(FacTAdapter(member, model.get_submodule(member.module), self, first))
            first += member.n_weight // d**2

    def cores(self, first: int, count: int) -> Tensor:
        """The (count, r, r) cores of consecutive slices, scale included."""
        rows = slice(first, first + count)
        if self.form == "tt":
            return self.S[rows] * self.scale
        mixed: Tensor = torch.tensordot(self.P[rows] * self.scale, self.C, 1)
        return mixed


class FacTAdapter(Adapter):
    """The slices of one weight: its own are those from `first` on, row by row of slices."""

    def __init__(self, site: Site, host: nn.Module, shared: FacTShared, first: int) -> None:
        host_tensor(site, host, site.parameter)
        super().__init__(site, ("weight",), "branch" if is_plain(host) else "swap")
        self._shared = (shared,)
        self._first = first

    def _middle(self) -> tuple[Tensor, int, int, Tensor, Tensor]:
        """The cores side by side as one matrix (a r, b r), a and b, U and V; the weight is (a d, b d)."""
        (shared,) = self._shared
        d, r = shared.U.shape
        a, b = self.site.out_features // d, self.site.in_features // d
        cores = shared.cores(self._first, a * b).view(a, b, r, r)
        return cores.transpose(1, 2).reshape(a * r, b * r), a, b, shared.U, shared.V

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says: V^T on each part of the input, the cores, U for each part of the output."""
        middle, a, b, u, v = self._middle()
        z = (x.reshape(*x.shape[:-1], b, -1) @ v.to(x.dtype)).flatten(-2)
        z = F.linear(z, middle.to(x.dtype))
        y: Tensor = z.view(*z.shape[:-1], a, -1) @ u.T.to(x.dtype)
        return y.flatten(-2)

    def delta(self) -> dict[str, Tensor]:
        """The slices in their places."""
        middle, a, b, u, v = self._middle()
        return {"weight": _spread(u, a) @ middle @ _spread(v, b).T}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Rank r times the smaller number of slices along a side."""
        core, a, b, u, v = self._middle()
        middle, up, down = core.detach(), _spread(u.detach(), a), _spread(v.detach(), b).T
        return (down, up @ middle) if b <= a else (middle @ down, up)


def _candidates(site: Site) -> tuple[Site, ...]:
    if site.kind != "group" or site.name != "*":
        return ()
    return tuple(m for m in site.members if m.kind == "linear" and m.role.startswith(("attn.", "mlp.")))


def _fits(member: Site, width: int) -> bool:
    return all(side % width == 0 for side in member.shape)


def _slices(matrix: Tensor, d: int) -> Tensor:
    """(a d, b d) to (a b, d, d), row by row of slices."""
    a, b = matrix.shape[0] // d, matrix.shape[1] // d
    return matrix.view(a, d, b, d).transpose(1, 2).reshape(a * b, d, d)


def _spread(factor: Tensor, times: int) -> Tensor:
    """Block-diagonal (times d, times r) with the factor in every block."""
    return torch.kron(torch.eye(times, dtype=factor.dtype, device=factor.device), factor)
