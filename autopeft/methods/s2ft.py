"""S2FT: a few waves on a weight whose rows and columns are re-ordered first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._bases import derived
from autopeft.methods._drawn import own_generator
from autopeft.methods._host import new_parameter
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import captured
from autopeft.methods._waves import count_waves, distinct_waves, nearest_tour, wave_energies, waves
from autopeft.methods.base import Adapter

__all__ = ["S2FT", "S2FTAdapter", "WaveImportance"]

WaveImportance = Literal["magnitude", "real"]
"""What frequencies are drawn by: the magnitude of the prior's Fourier transform, or of its real part alone."""


@dataclass(frozen=True, slots=True)
class S2FT:
    """`W + T(alpha Re IDFT(F))`: n trained Fourier coefficients, and T that puts rows and columns back in place.

    Zhang et al., 2026, arXiv 2605.08589 (sparse spectrum; not the structured sparsity of the same name), on top of
    FourierFT, arXiv 2405.03003. The change is sought where the gradient of the frozen model points: its rows are
    ordered along a nearest-neighbour tour, so are its columns, which makes it smooth and its spectrum uneven. Then n
    distinct frequencies are drawn with probability proportional to |DFT|^gamma, by the Gumbel top-k trick, so that the
    draw of a smaller size is part of that of a larger one. Coefficients start at zero. A convolution's weight is
    flattened to (out, in / groups * kh * kw).

    A real coefficient at (u, v) and one at (-u, -v) make the same cosine, so only one of the two is ever drawn.

    Attributes:
        gamma: 0 draws uniformly; the paper takes 1.5.
        alpha: scale of the change, as in FourierFT (which takes 150 to 300 at 768 x 768); None means
            `sqrt(2 * entries)`, which gives every wave the norm 1, so that one learning rate serves all shapes.
        importance: `magnitude` as in the paper, or `real`: coefficients are real, so that the imaginary part of the
            prior's spectrum is out of their reach.
        seed: seed of the first rows of the tours and of the draw.
    """

    gamma: float = 1.5
    alpha: float | None = None
    importance: WaveImportance = "magnitude"
    seed: int = 0

    family: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise UsageError(f"s2ft: gamma must be a number of at least 0, got {self.gamma!r}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"s2ft: alpha must be a positive number or null (waves of norm 1), got {self.alpha!r}")
        if self.importance not in get_args(WaveImportance):
            raise UsageError(
                f"s2ft: importance must be one of {', '.join(get_args(WaveImportance))}, got {self.importance!r}"
            )

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two, and the number of all waves, about half of the entries."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        most = count_waves(site.out_features, site.in_features)
        return tuple(sorted({*powers_of_two(most), most}))

    def cost(self, site: Site, size: int) -> Cost:
        """`n` coefficients; stored beside them are n frequencies and the two orders, 32 bits each."""
        n = check_size("s2ft", site, size, self.sizes(site))
        stored = 2 * n + site.out_features + site.in_features
        return Cost(trainable=n, stored=stored, bits=32 * stored, entries=site.n_weight, tensors=4)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> S2FTAdapter:
        """Coefficients zero; nothing is random.

        Raises:
            UsageError: when the option does not say which frequencies and orders, or they belong to another shape.
        """
        n = check_size("s2ft", site, option.size, self.sizes(site))
        chosen = option.indices
        if chosen is None or not {"rows", "columns"} <= set(chosen.extra):
            raise UsageError(
                f"option {option.key} does not say which {n} frequencies it trains in which order of rows and columns; "
                f"choose them with `select` (from the scores' evidence) before the plan is inserted"
            )
        index, rows, columns = (
            torch.from_numpy(a.copy()) for a in (chosen.values, chosen.extra["rows"], chosen.extra["columns"])
        )
        fits = len(index) == n and int(index[-1]) < site.n_weight
        for order, length in ((rows, site.out_features), (columns, site.in_features)):
            fits = fits and torch.equal(order.sort().values, torch.arange(length))
        if not fits:
            raise UsageError(
                f"option {option.key} holds {len(index)} frequencies up to {int(index[-1]):,} and orders of "
                f"{len(rows)} rows and {len(columns)} columns, which do not fit {n} frequencies of a weight of shape "
                f"{site.shape}; they belong to another tensor"
            )
        return S2FTAdapter(site, host, index, rows, columns, self.alpha)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The signal's energy along the waves that `select` would choose, for each size; waves are orthogonal."""
        _, _, flat, energies = self._ranked(site, evidence)
        return captured(energies, [min(size, len(flat)) for size in sizes])

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """The first `size` frequencies of the draw; `extra` holds the orders as `rows` and `columns`."""
        n = check_size("s2ft", site, size, self.sizes(site))
        rows, columns, flat, _ = self._ranked(site, evidence)
        return Indices(flat[:n].sort().values.numpy(), {"rows": rows.numpy().copy(), "columns": columns.numpy().copy()})

    def _ranked(self, site: Site, evidence: Evidence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Orders of rows and columns; every frequency as it is drawn, and the signal's energy along its wave."""
        signal = evidence["weight"].signal
        rows, columns = derived(f"tours/{self.seed}/{site.name}", signal, None, lambda s: self._tours(site, s))
        matrix = signal.detach().flatten(1).to(device="cpu", dtype=torch.float64)
        spectrum = torch.fft.fft2(matrix[rows][:, columns])
        flat, paired = distinct_waves(*matrix.shape)
        size = (spectrum.real.abs() if self.importance == "real" else spectrum.abs()).flatten()[flat]
        generator = own_generator(self.seed, f"{site.name}/waves")
        uniform = torch.rand(len(flat), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        # Both of a pair stand for one wave, which doubles its weight. A size of zero is drawn last, but can be.
        weight = self.gamma * size.clamp_min(1e-150).log() + torch.where(paired, math.log(2.0), 0.0)
        drawn = torch.sort(weight - (-uniform.log()).log(), descending=True, stable=True).indices
        return rows, columns, flat[drawn], wave_energies(spectrum, flat, paired)[drawn]

    def _tours(self, site: Site, signal: Tensor) -> tuple[Tensor, Tensor]:
        matrix = signal.flatten(1).to(device="cpu", dtype=torch.float64)
        generator = own_generator(self.seed, f"{site.name}/tours")
        starts = [int(torch.randint(n, (), generator=generator)) for n in matrix.shape]
        return nearest_tour(matrix, starts[0]), nearest_tour(matrix.T, starts[1])


class S2FTAdapter(Adapter):
    """`coefficients` (n,); and saved, not trained, int32: frequencies `index` (n,) and the orders `rows`, `columns`.

    The change is dense, so the host runs with its changed weight.
    """

    index: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self, site: Site, host: nn.Module, index: Tensor, rows: Tensor, columns: Tensor, alpha: float | None
    ) -> None:
        super().__init__(site, ("weight",), "swap")
        self.coefficients = new_parameter(host, torch.zeros(len(index)))
        for name, tensor in (("index", index), ("rows", rows), ("columns", columns)):
            self.register_buffer(name, tensor.to(self.coefficients.device, torch.int32))
        self.alpha = math.sqrt(2 * site.n_weight) if alpha is None else alpha

    def delta(self) -> dict[str, Tensor]:
        """The waves with rows and columns put back, as a tensor of the site's shape."""
        site = self.site
        smooth = self.alpha * waves(self.coefficients, self.index.long(), site.out_features, site.in_features)
        placed = smooth.index_select(0, self.rows.argsort()).index_select(1, self.columns.argsort())
        return {"weight": placed.view(site.shape)}
