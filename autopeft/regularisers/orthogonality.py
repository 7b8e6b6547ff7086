"""Orthogonality of low-rank factors, among themselves or to the pre-trained weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Inserted, StepState, Task, Term
from autopeft.errors import UsageError
from autopeft.methods._host import host_tensor, rows_of
from autopeft.methods._l1 import L1OfProduct
from autopeft.methods.base import Adapter
from autopeft.methods.pego import PEGOAdapter
from autopeft.regularisers._changes import adapters_of, exactly, note_nothing
from autopeft.regularisers._term import BaseTerm, check_weight

__all__ = ["Orthogonality", "OrthogonalityForm"]

OrthogonalityForm = Literal["rows", "both", "weight"]
"""What is kept orthogonal: the rows of every A, also the columns of every B, or the changes and what was there."""


@dataclass(frozen=True, slots=True)
class Orthogonality:
    """A penalty on options with factors A (r, in) and B (out, r): LoRA, PEGO and their like.

    - `rows` adds `weight * sum of ||A A^T - I||_F^2`: the directions that are read differ, at length one.
    - `both` adds the same of `B^T B`, as AdaLoRA has it of both factors (Zhang et al., 2023, arXiv 2303.10512, equation
      4). AdaLoRA has singular values between the factors; where B starts at zero, as in LoRA, it is pushed away from
      there.
    - `weight` adds PEGO's penalty (Hu et al., 2024, arXiv 2407.15085): `sum of ||W (B A)^T||_1`, entrywise, which keeps
      a change orthogonal to the rows of the weight it goes on, and for options of several members the same of every
      pair of members. The method `pego` has it built in; set one of the two.

    Other options are left alone.

    Attributes:
        weight: of the penalty; 0 switches it off. AdaLoRA takes 0.1 to 0.5, PEGO 1e-3.
        form: `rows`, `both` or `weight`.
    """

    weight: float = 0.1
    form: OrthogonalityForm = "rows"

    def __post_init__(self) -> None:
        check_weight("orthogonality", self.weight)
        if self.form not in get_args(OrthogonalityForm):
            raise UsageError(
                f"orthogonality: form must be one of {', '.join(get_args(OrthogonalityForm))}, got {self.form!r}"
            )

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Find the factors."""
        if not self.weight:
            return BaseTerm()
        found = [pair for _, adapter in adapters_of(inserted) if (pair := _Pair.of(adapter, inserted.model))]
        if not found:
            note_nothing("orthogonality", "factors A and B")
            return BaseTerm()
        return _Penalty(self, found)


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """The factors of one option.

    Attributes:
        down: A, (members * rank, in_features).
        up: B, (out_features, members * rank).
        frozen: the weight they change, (out_features, in_features): a view.
        members: how many changes the factors hold.
    """

    down: nn.Parameter
    up: nn.Parameter
    frozen: Tensor
    members: int

    @classmethod
    def of(cls, adapter: Adapter, model: nn.Module) -> _Pair | None:
        """The factors of an adapter; None when it has none."""
        site, down, up = adapter.site, getattr(adapter, "A", None), getattr(adapter, "B", None)
        if not (isinstance(down, nn.Parameter) and isinstance(up, nn.Parameter)) or "weight" not in adapter.slots:
            return None
        if down.ndim != 2 or down.shape[::-1] != (site.in_features, up.shape[-1]) or len(up) != site.out_features:
            return None
        weight = rows_of(site, host_tensor(site, model.get_submodule(site.module), site.parameter))
        members = len(down) // adapter.rank if isinstance(adapter, PEGOAdapter) else 1
        return cls(down, up, weight.detach().flatten(1), members)

    def penalties(self, form: OrthogonalityForm) -> Iterator[Tensor]:
        """The summands."""
        if form != "weight":
            yield _from_identity(self.down)
            if form == "both":
                yield _from_identity(self.up.T)
            return
        frozen = self.frozen.to(self.down.device, self.down.dtype)
        downs, ups = torch.chunk(self.down, self.members), torch.chunk(self.up, self.members, dim=1)
        for i, (a, b) in enumerate(zip(downs, ups, strict=True)):
            yield L1OfProduct.apply(frozen @ a.T, b)
            for other_a, other_b in zip(downs[i + 1 :], ups[i + 1 :], strict=True):
                yield L1OfProduct.apply(b @ (a @ other_a.T), other_b)


class _Penalty(BaseTerm):
    """The sum over all factors."""

    def __init__(self, settings: Orthogonality, pairs: list[_Pair]) -> None:
        self._settings = settings
        self._pairs = pairs

    def add(self, state: StepState) -> Tensor | None:
        """The weighted sum."""
        with exactly(self._pairs[0].down):
            summands = [term for pair in self._pairs for term in pair.penalties(self._settings.form)]
            return self._settings.weight * torch.stack(summands).sum()


def _from_identity(rows: Tensor) -> Tensor:
    """`||R R^T - I||_F^2`."""
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)).square().sum()
