"""Core: a small trained matrix between frozen bases of the weight's two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from autopeft.core.bases import Bases
from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._bases import LARGEST_RANK, top_singular
from autopeft.methods._core_bases import MEASURED, RECOMPUTED, Basis, chosen_bases, drawn_bases
from autopeft.methods._core_shapes import (
    Extent,
    Shape,
    best_rectangle,
    grid_side,
    rectangle_of,
    rectangles,
    shape_energies,
    shape_sizes,
)
from autopeft.methods._host import host_tensor, new_parameter
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import squared_singular_values

__all__ = ["Core", "CoreAdapter"]


@dataclass(frozen=True, slots=True)
class Core:
    """`W + U M V^T` with M trained from zero between frozen orthonormal U (out, a) and V (in, b).

    LoRA-XS (Balazy et al., 2024, arXiv 2405.17604, equation 2) without the singular values, so that M is measured in
    the units of W. It costs a b where LoRA costs r (in + out), so a small budget reaches every matrix. A convolution's
    weight is flattened to (out, in / groups * kh * kw); with groups, every group reads through the one V.

    Attributes:
        basis: which directions come first.
            `weight`: the singular vectors of W.
            `gradient`: those of the evidence's signal, the most energy that any bases capture.
            `aligned`: with A and C the gradients of two halves of the data, the eigenvectors of the largest eigenvalues
            of the symmetric parts of A C^T (left) and A^T C (right): directions that the halves agree on.
            `activation`: the right singular vectors of the inputs (EVA, Paischer et al., 2024, arXiv 2410.07170,
            section 3.1), and on the left those of the gradients of the outputs.
            `trajectory`: the singular vectors of the weight change of a short full fine-tuning, thrown away.
            `random`: drawn from `seed`, the control.
            `weight` and `random` are computed again when a plan is loaded and not stored. The others are carried by the
            plan and counted as stored, a out + b in numbers besides the a b trained ones.
        shape: which entries of M are trained: `square`, r x r at size r; `rectangle`, the a x b with a b = size that
            captures most; `diagonal`, r at size r; `blocks`, size blocks of side `block` along the diagonal.
        block: side of the blocks.
        seed: of the bases `random`.

    Raises:
        UsageError: naming the field and the value that is refused. Rectangles need bases that are not stored, because
            which sides they have, and so what storing them costs, is known after the price.
    """

    basis: Basis = "weight"
    shape: Shape = "square"
    block: int = 4
    seed: int = 0

    family: ClassVar[str] = "core"

    def __post_init__(self) -> None:
        for name, kind in (("basis", Basis), ("shape", Shape)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(
                    f"core: {name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}"
                )
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2:
            raise UsageError(
                f"core: block must be a whole number of at least 2 (1 is shape: diagonal), got {self.block!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"core: seed must be a whole number of at least 0, got {self.seed!r}")
        if self.shape == "rectangle" and self.basis not in RECOMPUTED:
            raise UsageError(
                f"core: rectangles between the bases {self.basis!r} have no price that is known beforehand, because "
                f"these are stored; take shape square, diagonal or blocks, or basis {' or '.join(sorted(RECOMPUTED))}"
            )

    @property
    def measured(self) -> Mapping[str, int]:
        """The bases that need a pass over the data of their own, with the most directions that any size takes."""
        return {self.basis: LARGEST_RANK} if self.basis in MEASURED else {}

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """As far as the smaller side of the weight goes, and 64.

        `square`: 1 to 16, then 18, 20, 24, 28, 32, 40, 48, 56, 64. `diagonal` and `blocks`: 1, 2, 3, 4, 6, 8, 12, ...
        `rectangle`: numbers with many factors. Other numbers are refused when no rectangle has them.
        """
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        return shape_sizes(self.shape, self.block, grid_side(site))

    def cost(self, site: Site, size: int) -> Cost:
        """`r^2`, or the number of trained entries in other shapes; bases that are stored besides are not trained."""
        size = self._checked(site, size)
        trained = {"square": size * size, "blocks": size * self.block**2}.get(self.shape, size)
        if self.basis in RECOMPUTED:
            return Cost.plain(trained, entries=site.n_weight)
        stored = trained + (site.out_features + site.in_features) * self._extent(site, size, None).rows
        return Cost(trained, stored, 32 * stored, site.n_weight, 3)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> CoreAdapter:
        """M zero; the bases come from the host's weight, from the seed or from the plan, and nothing is random."""
        extent = self._extent(site, self._checked(site, option.size), option.indices)
        if self.basis == "weight":
            u, v = top_singular(host_tensor(site, host, site.parameter), site.rows, max(extent.rows, extent.columns))
        elif self.basis == "random":
            u, v = drawn_bases(site, self.seed)
        elif option.bases is not None:
            u, v = torch.from_numpy(option.bases.left.copy()), torch.from_numpy(option.bases.right.copy())
        else:
            raise UsageError(
                f"the plan carries no bases for {option.key}, which lies between those of {self.basis!r}; they are "
                f"chosen when a plan is made from scores"
            )
        wanted = ((site.out_features, extent.rows), (site.in_features, extent.columns))
        u, v = u[:, : extent.rows], v[:, : extent.columns]
        if (tuple(u.shape), tuple(v.shape)) != wanted:
            raise UsageError(
                f"the bases of {option.key} are of shape {tuple(u.shape)} and {tuple(v.shape)}, its size needs "
                f"{wanted[0]} and {wanted[1]}; the plan belongs to another model"
            )
        return CoreAdapter(site, host, u, v, extent, stored=self.basis not in RECOMPUTED)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Squared norm of what is trained of `U^T S V`, S the signal: the energy of M's own gradient at step 0.

        Between bases that were made from S itself (`gradient`) this counts noise as gain, three times and more of what
        other data would show (`studies/cores`): discount it by `gain.methods` on a menu of several bases.
        """
        return shape_energies(self.shape, self.block, self._squares(site, evidence), sizes)

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """The best rectangle's entries in the grid of bases; None for the other shapes, which are known."""
        if self.shape != "rectangle":
            return None
        return best_rectangle(self._squares(site, evidence), self._checked(site, size))

    def bases(self, site: Site, evidence: Evidence, size: int, indices: Indices | None) -> Bases | None:
        """The first directions on both sides; None for bases that are computed again."""
        if self.basis in RECOMPUTED:
            return None
        rows, columns, _ = self._extent(site, self._checked(site, size), indices)
        u, v = chosen_bases(self.basis, site, evidence["weight"], self.seed)
        return Bases(u[:, :rows].contiguous().numpy().copy(), v[:, :columns].contiguous().numpy().copy())

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def _squares(self, site: Site, evidence: Evidence) -> Tensor:
        """`(u_i^T S v_j)^2` of the whole grid, float64."""
        known = evidence["weight"]
        wide = torch.promote_types(known.signal.dtype, torch.float32)
        signal = known.signal.detach().flatten(1).to(device="cpu", dtype=wide)
        if self.basis == "gradient" and wide == torch.float64:
            # Between its own vectors the signal is diagonal, exactly: vectors rounded to float32 would show in slopes.
            return squared_singular_values(signal)[:LARGEST_RANK].diag()
        u, v = chosen_bases(self.basis, site, known, self.seed)
        return (u.to(wide).T @ signal @ v.to(wide)).double().square()

    def _checked(self, site: Site, size: int) -> int:
        size = check_size("core", site, size, self.sizes(site))
        if self.shape == "rectangle" and not rectangles(size, grid_side(site)):
            raise UsageError(
                f"core on {site.name}: no rectangle of {size} entries fits a grid of {grid_side(site)} by "
                f"{grid_side(site)}; the sizes worth offering are {', '.join(map(str, self.sizes(site)))}"
            )
        return size

    def _extent(self, site: Site, size: int, indices: Indices | None) -> Extent:
        if self.shape == "rectangle":
            return Extent(*rectangle_of(site, size, indices, grid_side(site)))
        if self.shape == "square":
            return Extent(size, size)
        block = 1 if self.shape == "diagonal" else self.block
        return Extent(size * block, size * block, block)


class CoreAdapter(LowRankAdapter):
    """The core `M`, and its bases `U` (out_features, a) and `V` (in_features, b).

    M is (a, b). In blocks of side s it is (a, s), the blocks below each other. The bases are buffers: saved when they
    cannot be computed again, not saved otherwise.
    """

    U: Tensor
    V: Tensor

    def __init__(self, site: Site, host: nn.Module, u: Tensor, v: Tensor, extent: Extent, *, stored: bool) -> None:
        super().__init__(site, host)
        self._block = extent.block
        self.M = new_parameter(host, torch.zeros(extent.rows, extent.block or extent.columns))
        self.register_buffer("U", u.to(self.M, copy=True), persistent=stored)
        self.register_buffer("V", v.to(self.M, copy=True), persistent=stored)
        self.recomputed = frozenset() if stored else frozenset({"U", "V"})

    def _factors(self) -> tuple[Tensor, Tensor]:
        """`(down, up)`: M joins one side, so that both products have the smaller rank."""
        if self._block:
            blocks = self.M.view(-1, self._block, self._block)
            return (blocks @ self.V.T.view(len(blocks), self._block, -1)).flatten(0, 1), self.U
        if self.U.shape[1] <= self.V.shape[1]:
            return self.M @ self.V.T, self.U
        return self.V.T, self.U @ self.M

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at rank min(a, b) in both products."""
        down, up = self._factors()
        return self.expand(self.contract(x, down), up)

    def delta(self) -> dict[str, Tensor]:
        """`U M V^T` as a tensor of the site's shape."""
        down, up = self._factors()
        return {"weight": (up @ down).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`(V^T, U M)`, or `(M V^T, U)` where that has fewer rows; never two zeros, from which LoRA cannot start."""
        u, v, m = self.U, self.V, self.M.detach()
        if self._block:
            blocks = m.view(-1, self._block, self._block)
            return v.T.clone(), torch.einsum("oks,kst->okt", u.view(len(u), -1, self._block), blocks).flatten(1)
        if u.shape[1] >= v.shape[1]:
            return v.T.clone(), u @ m
        return (m @ v.T, u.clone()) if bool(m.any()) else (v[:, : u.shape[1]].T.clone(), torch.zeros_like(u))
