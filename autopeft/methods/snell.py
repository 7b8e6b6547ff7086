"""SNELL: a sparse change of a weight, made by a kernel of low-rank factors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._bracket import Bracket
from autopeft.methods._host import host_tensor, is_plain, new_parameter
from autopeft.methods._kernels import Kernel, KernelName
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._sparsifiers import Sparsifier, SparsifierName, kept_entries
from autopeft.methods._spectrum import energy
from autopeft.methods._tiles import Change, DenseProduct, Geometry, TiledProduct
from autopeft.methods.base import Adapter, Role

__all__ = ["SNELL", "Implementation", "SNELLAdapter", "SNELLStart"]

SNELLStart = Literal["identity", "released"]
"""Whether the change is zero at step 0, or what the factors' draw makes of it."""

Implementation = Literal["auto", "reference", "tiled"]
"""How the products are computed."""

_TILE, _TILE_ELSEWHERE = 1 << 17, 1 << 21
"""Entries of a tile: few enough for a cache on the CPU, and elsewhere so many that launches do not count."""

_SMALLEST, _SMALLEST_ELSEWHERE = 1 << 15, 1 << 18
"""Entries of a tile below which calls cost more than work."""

_SHARE = 32
"""Scalars of an input or output for each entry of a tile."""

_PANEL = 1 << 23
"""Most entries of the changed weight that exist at a time on the CPU: wide products are faster."""


@dataclass(frozen=True, slots=True)
class SNELL:
    """`W + S(K)`, `K[j, i] = k(A_i, B_j)` for rows of trained A (in, r) and B (out, r); S zeroes the small entries.

    SNELL (Shen et al., 2024, arXiv 2411.01800, equations 4 and 5), and with `kernel: mixed` the kernel of SNELLA
    (arXiv 2510.24037) as its code has it. K has full rank though it is made of r (in + out) numbers; they are all that
    is trained, and the kernel's scalars where they are learned. Of N entries exactly `N - ceil(sparsity N)` are kept,
    those of largest `|K|`; among equals the first, input by input. The gradient takes the threshold as a constant.

    K and S exist some columns at a time, are made again in the backward, and are added to W before the product, so that
    training keeps x and the factors, as LoRA does. Non-plain hosts (weight-standardised convolutions) run on a dense
    changed weight. Under autocast and on half-precision hosts the change is multiplied apart from W, whose rounding
    would swallow it. A convolution's weight is flattened to (out, in / groups * kh * kw).

    Start. A change that is zero because K is has no gradient under a quadratic sparsifier, and one behind a gain of
    zero pays a scalar more and moves a step later. So `identity` subtracts what the change is at step 0, in the kept
    places: `mask(K) (f(K) - v)`. All rows of B start as one row b, drawn like the others, which makes
    `v_i = f(k(A_i, b))` one number per input in place of a second kernel; the outputs part with the first step, as they
    do in LoRA, whose B starts as one row as well. A and b are drawn from a stored seed, v is not stored. `released`
    draws all of B and subtracts nothing: the model starts changed, by some 1e-6 per kept entry (`soft`, `square`) or
    1e-3 (`hard`, `none`).

    The released code sparsifies with `square`, switches to `none` at sparsity 0, fixes the coefficients of `piecewise`,
    interpolates the threshold, and runs dropout and stochastic depth on the change, which is left out here.

    Attributes:
        kernel: `linear`, `piecewise` (the released one), `sigmoid`, `rbf` or `mixed`; see `Kernel`.
        sparsifier: `soft` (the paper's), `square` (the released one), `hard`, or `none`, which keeps every entry.
        sparsity: share of the entries that are zeroed, from 0 to below 1.
        norm_p: p of the distances in `piecewise` and `mixed`, at least 1.
        coefficient: the number c in front of the kernel.
        learn: whether the kernel's scalars are trained; three of `mixed` always are.
        start: `identity` or `released`.
        implementation: `tiled`; `reference`, which makes the dense change in the forward and again in the backward; or
            `auto`, which is `tiled` with a fused kernel where there is a CUDA device for it.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    kernel: KernelName = "piecewise"
    sparsifier: SparsifierName = "soft"
    sparsity: float = 0.9
    norm_p: float = 2.0
    coefficient: float = 0.1
    learn: bool = False
    start: SNELLStart = "identity"
    implementation: Implementation = "auto"

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        for name, choices in (
            ("kernel", get_args(KernelName)),
            ("sparsifier", get_args(SparsifierName)),
            ("start", get_args(SNELLStart)),
            ("implementation", get_args(Implementation)),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"snell: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"snell: sparsity is the share of zeros, from 0 to below 1, got {self.sparsity!r}")
        if not (math.isfinite(self.norm_p) and self.norm_p >= 1):
            raise UsageError(f"snell: norm_p must be a number of at least 1, got {self.norm_p!r}")
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise UsageError(f"snell: coefficient must be a positive number, got {self.coefficient!r}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d that is larger than its factors and keeps an entry."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two whose factors have fewer entries than the weight itself."""
        if not site.is_matrix or "weight" not in site.slots or not self.kept(site):
            return ()
        return powers_of_two((site.n_weight - 1 - self._scalars()) // (site.in_features + site.out_features))

    def kept(self, site: Site) -> int:
        """How many entries of the weight are changed."""
        return site.n_weight if self.sparsifier == "none" else kept_entries(self.sparsity, site.n_weight)

    def _scalars(self) -> int:
        return Kernel(self.kernel).trained(self.learn)

    def cost(self, site: Site, size: int) -> Cost:
        """`r (in + out)` and the learned scalars; the number of kept entries and the seed are stored beside them."""
        r = check_size("snell", site, size, self.sizes(site))
        trained = r * (site.in_features + site.out_features) + self._scalars()
        whole = 1 if self.start == "released" else 2
        return Cost(
            trained, trained + whole, 32 * trained + 64 * whole, self.kept(site), 2 + bool(self._scalars()) + whole
        )

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SNELLAdapter:
        """Factors from uniform distributions; those of the identity start from a seed that is drawn."""
        r = check_size("snell", site, option.size, self.sizes(site))
        return SNELLAdapter(site, host, r, self, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Expected energy of the signal in a blind space of as many dimensions p as the start can move in: `p / N`.

        `identity`: with m kept inputs, a step of B moves r m' = min(r, m) directions for every output and one of A the
        same direction for all outputs, `p = m' out + (m - m')`. `released`: the number of trained scalars. Never more
        than the kept entries.
        """
        kept, total = self.kept(site), site.n_weight
        share = energy(evidence["weight"].signal) / total
        inputs = -(-kept // site.out_features)
        gains = []
        for r in sizes:
            p = r * (site.in_features + site.out_features) + self._scalars()
            if self.start == "identity":
                p = min(r, inputs) * site.out_features + inputs - min(r, inputs)
            gains.append(share * min(p, kept))
        return tuple(gains)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """None: which entries are kept follows from the factors."""
        return None


class SNELLAdapter(Adapter):
    """Factors `A` (in_features, r) and `B` (out_features, r), and `scalars` where the kernel has learned ones.

    Saved beside them, int64 scalars: `kept`, the number of entries that stay (the sparsity, exactly), and `seed`, which
    the identity start is drawn from.

    Attributes:
        tile: how many entries of the kernel are worked on at a time, at most.
        panel: how many entries of the changed weight exist at a time, at most.
    """

    moving = frozenset({"seed"})
    # The two enter alike, and neither sums over inputs or spreads over outputs.
    rate_roles: ClassVar[Mapping[str, Role]] = MappingProxyType({"A": "core", "B": "core", "scalars": "vector"})
    A: nn.Parameter
    B: nn.Parameter
    kept: Tensor
    seed: Tensor
    offset: Tensor
    fixed: Tensor
    _host: Callable[[], nn.Module | None]

    def __init__(self, site: Site, host: nn.Module, rank: int, method: SNELL, generator: torch.Generator) -> None:
        host_tensor(site, host, site.parameter)
        plain = is_plain(host) and not isinstance(getattr(host, "padding", None), str)
        super().__init__(site, ("weight",), "swap" if not plain else "branch" if site.rows else "stand_in")
        self.method, self.rank = method, rank
        self.geometry = Geometry.of(site, host) if plain else Geometry((site.out_features, site.in_features))
        self._kernel = Kernel(method.kernel, method.norm_p)
        self._sparsifier = Sparsifier(method.sparsifier)
        object.__setattr__(self, "_host", weakref.ref(host))
        seed = int(torch.randint(0, 2**62, (), generator=generator))
        A, b = self._drawn(seed, 1)
        B = b.expand(site.out_features, rank)
        if method.start == "released":
            A, B = self._drawn(seed, site.out_features)
        self.A, self.B = new_parameter(host, A), new_parameter(host, B.clone())
        start = torch.tensor(self._kernel.start(method.coefficient), dtype=torch.float64)
        first = len(start) - self._kernel.trained(method.learn)
        self.register_buffer("fixed", start[:first].to(self.A), persistent=False)
        if first < len(start):
            self.scalars = new_parameter(host, start[first:])
        self.register_buffer("kept", torch.tensor(method.kept(site), device=self.A.device))
        if method.start == "identity":
            self.register_buffer("seed", torch.tensor(seed, device=self.A.device))
            self.register_buffer("offset", torch.zeros_like(self.A[:, 0]).detach(), persistent=False)
            self._of_seed: int | None = None
            self._looked: tuple[Tensor, int] | None = None
        self._counted: tuple[Tensor, int, int] | None = None
        self._bracket = Bracket()
        cpu = self.A.device.type == "cpu"
        self.tile, self.panel = (_TILE, _PANEL) if cpu else (_TILE_ELSEWHERE,) * 2
        self._smallest = _SMALLEST if cpu else _SMALLEST_ELSEWHERE

    def _drawn(self, seed: int, rows: int) -> tuple[Tensor, Tensor]:
        """A, and so many rows of B, from their uniform distributions."""
        generator = torch.Generator().manual_seed(seed)
        n, out = self.site.in_features, self.site.out_features
        shapes = ((n, self.rank), (rows, self.rank))
        first, second = (
            (2 * torch.rand(shape, generator=generator) - 1) * bound
            for shape, bound in zip(shapes, self._kernel.bounds(n, out, self.rank), strict=True)
        )
        return first, second

    def around(self, run: Callable[..., Any], *args: Any) -> Tensor:
        """The host's product with the changed weight, a few columns at a time; `run` where they cannot be summed."""
        (x,) = args
        host = self._host()
        if host is None:
            raise UsageError(f"the host of {self.site.name} is gone; its adapter cannot run")
        weight, bias = host._parameters[self.site.parameter], host._parameters.get("bias")
        assert weight is not None
        alike = x.dtype == weight.dtype == self.A.dtype and not torch.is_autocast_enabled(x.device.type)
        constant = not weight.requires_grad and (bias is None or not bias.requires_grad)
        if not alike or not constant or self.method.implementation == "reference":
            y: Tensor = run(x)
            return y + self.branch(x).to(y.dtype)
        return self._tiled(x, weight.flatten(1), bias)

    def branch(self, x: Tensor) -> Tensor:
        """The change alone times x, in the precision that the host runs in, but never in float16.

        A change starts at some 1e-6, below what float16 holds at full precision.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(torch.float32 if dtype == torch.float16 else dtype)
        if self.method.implementation == "reference":
            product: Tensor = DenseProduct.apply(x, *self._inputs(), self._change(), self.geometry)
            return product
        return self._tiled(x, None, None)

    def _tiled(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        A, B, scalars, offset = self._inputs()
        change = self._change(self.geometry.scalars(x))
        cut = change.cut(A.detach(), B.detach(), scalars.detach(), self.geometry, self._bracket)
        product: Tensor = TiledProduct.apply(x, A, B, scalars, offset, weight, bias, change, self.geometry, cut)
        return product

    def delta(self) -> dict[str, Tensor]:
        """The change as a tensor of the site's shape, with exactly the kept entries."""
        A, B, scalars, offset = self._inputs()
        with torch.autocast(device_type=A.device.type, enabled=False):
            return {"weight": self._change().dense(A, B, scalars, offset).view(self.site.shape)}

    def _change(self, scalars: int | None = None) -> Change:
        """What is applied to the factors; tiles that do not show beside so many scalars."""
        # Reading the count would wait for the device in every forward pass; its version tells when it has changed.
        if self._counted is None or self._counted[0] is not self.kept or self._counted[1] != self.kept._version:
            self._counted = (self.kept, self.kept._version, int(self.kept))
        tile = self.tile if scalars is None else min(self.tile, max(self._smallest, scalars // _SHARE))
        fused = self.method.implementation == "auto"
        return Change(self._kernel, self._sparsifier, self._counted[2], self.method.learn, tile, self.panel, fused)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The factors, all scalars of the kernel, and what is subtracted."""
        scalars = torch.cat((self.fixed, self.scalars)) if hasattr(self, "scalars") else self.fixed
        return self.A, self.B, scalars, self._offset() if self.method.start == "identity" else None

    def _offset(self) -> Tensor:
        """`v` of the seed as it is now: loading replaces it."""
        if self._looked is None or self._looked[0] is not self.seed or self._looked[1] != self.seed._version:
            self._looked = (self.seed, self.seed._version)
            seed = int(self.seed)
            if seed != self._of_seed:
                self.offset.copy_(self._start(seed))
                self._of_seed = seed
        return self.offset

    def _start(self, seed: int) -> Tensor:
        """What the change is at step 0, per input, float64: of the method's sparsity, whatever is kept by now."""
        A, b = self._drawn(seed, 1)
        scalars = torch.tensor(self._kernel.start(self.method.coefficient), dtype=torch.float64)
        out = self.site.out_features
        column = self._kernel.column(A.double(), b[0].double(), scalars, out)
        return self._sparsifier.start(column, self.method.kept(self.site), out)
