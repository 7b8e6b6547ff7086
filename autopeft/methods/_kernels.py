"""Kernels of rows of two factors: whole, and tile by tile with hand-written gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autopeft.methods._sparsifiers import Cut, Sparsifier

__all__ = ["Distances", "Kernel", "KernelName", "KernelTiles"]

KernelName = Literal["linear", "piecewise", "sigmoid", "rbf", "mixed"]
"""How a row of A and a row of B make one entry of the weight change."""

_COUNTS = {"linear": 1, "piecewise": 2, "sigmoid": 3, "rbf": 3, "mixed": 5}
_SLOPE = 4.0
"""Start of beta, at which a sigmoid has the slope 1 at 0."""

_FEW = 3
"""Most coordinates over which distances are summed one by one."""

_COLDEST = 1e-3
"""Least temperature of the mixed kernel: at 0 it would divide by nothing."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """`k(a, b)` of rows a of A and b of B, with scalars s.

    With `D1`, `D2` the p-norm distances over the first and the second half of the r coordinates (the first half is the
    larger one where r is odd):

    - `linear`: `s0 a.b`
    - `piecewise`: `s0 D1 + s1 D2`, started at (c, -c)
    - `sigmoid`: `s0 / (1 + exp(-s1 a.b)) + s2`, started at (c, 4, -c / 2)
    - `rbf`: `s0 exp(-s1 |a - b|^2) + s2`, started at (c, 4, -c)
    - `mixed`: `P + s2 softmax(P / |s3|) + s4` with P the piecewise kernel, the softmax over all rows of B, started at
      (c, -c, 1, 1, 0); |s3| is at least 0.001.

    Attributes:
        name: which one.
        norm_p: p of the distances of `piecewise` and `mixed`.
    """

    name: KernelName
    norm_p: float = 2.0

    def start(self, coefficient: float) -> tuple[float, ...]:
        """The scalars at the start, for the coefficient c."""
        c = coefficient
        return {
            "linear": (c,),
            "piecewise": (c, -c),
            "sigmoid": (c, _SLOPE, -c / 2),
            "rbf": (c, _SLOPE, -c),
            "mixed": (c, -c, 1.0, 1.0, 0.0),
        }[self.name]

    def trained(self, learn: bool) -> int:
        """How many of the last scalars are trained: all with `learn`, otherwise the three of `mixed` alone."""
        return _COUNTS[self.name] if learn else 3 if self.name == "mixed" else 0

    def bounds(self, in_features: int, out_features: int, rank: int) -> tuple[float, float]:
        """Bounds of the uniform distributions that A and B start from.

        For kernels of distances those of the released code, the inverse root of `in r / 2` and `out r / 2`; for those
        of products `(in r)^(-1/4)`, at which the kernel starts as large.
        """
        if self.name in ("linear", "sigmoid"):
            return ((in_features * rank) ** -0.25,) * 2
        return (in_features * rank / 2) ** -0.5, (out_features * rank / 2) ** -0.5

    def value(self, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
        """The kernel of all pairs, differentiable; distances from plain differences, whose gradient is 0 at 0.

        Args:
            A: (n, r).
            B: (out, r).
            s: the scalars.

        Returns:
            (out, n).
        """
        base = self._base(A, B, s)
        if self.name != "mixed":
            return base
        return base + s[2] * torch.softmax(base / _temperature(s[3]), 0) + s[4]

    def column(self, A: Tensor, b: Tensor, s: Tensor, out_features: int) -> Tensor:
        """What `value` is in every row when all rows of B are b (r,): (n,)."""
        base = self._base(A, b[None], s)[0]
        # A softmax over equal numbers.
        return base + s[2] / out_features + s[4] if self.name == "mixed" else base

    def _base(self, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
        if self.name == "linear":
            return s[0] * (B @ A.T)
        if self.name == "sigmoid":
            return s[0] * torch.sigmoid(s[1] * (B @ A.T)) + s[2]
        if self.name == "rbf":
            square = B.square().sum(1)[:, None] - 2 * (B @ A.T) + A.square().sum(1)
            return s[0] * torch.exp(-s[1] * square) + s[2]
        half = (A.shape[1] + 1) // 2
        first, second = (
            torch.cdist(b, a, p=self.norm_p, compute_mode="donot_use_mm_for_euclid_dist")
            for a, b in ((A[:, :half], B[:, :half]), (A[:, half:], B[:, half:]))
        )
        return s[0] * first + s[1] * second

    def tiles(self, A: Tensor, B: Tensor, s: Tensor, *, learn: bool) -> KernelTiles:
        """The kernel of one pass over tiles; `learn` says whether gradients of the scalars are wanted."""
        if self.name in ("piecewise", "mixed") and self.norm_p == 2.0:
            return Distances(self, A, B, s, learn)
        return _Plain(self, A, B, s)


class KernelTiles(ABC):
    """A kernel in tiles of columns, and the gradients that are collected from them.

    Args:
        A: (in, r), without a graph from here on.
        B: (out, r).
        s: the kernel's scalars.
    """

    def __init__(self, A: Tensor, B: Tensor, s: Tensor) -> None:
        self.A, self.B, self.s = A.detach().contiguous(), B.detach().contiguous(), s.detach()

    @abstractmethod
    def value(self, start: int, stop: int) -> Tensor:
        """(out, stop - start); the caller may overwrite it."""

    @abstractmethod
    def pull(self, grad: Tensor) -> None:
        """Take in the gradient of the tile that `value` gave last; may overwrite it."""

    @abstractmethod
    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of A, B and the scalars."""

    def change(
        self, start: int, stop: int, sparsifier: Sparsifier, cut: Cut | None, offset: Tensor | None, grad: Tensor | None
    ) -> Tensor:
        """What the sparsifier makes of a tile.

        Args:
            start: first column.
            stop: last column, exclusive.
            sparsifier: what is done to the kernel.
            cut: which entries stay; None for all.
            offset: what is subtracted in these columns, or None.
            grad: the gradient of the change in these columns, to take in; None for none.
        """
        kernel, number = self.value(start, stop), start * len(self.B)
        pulled = None if grad is None else torch.empty_like(kernel).copy_(grad)
        change = sparsifier.work_(kernel, cut, number, offset, pulled)
        if pulled is not None:
            self.pull(pulled)
        return change


class _Plain(KernelTiles):
    """Any kernel, by automatic differentiation of each tile."""

    def __init__(self, kernel: Kernel, A: Tensor, B: Tensor, s: Tensor) -> None:
        super().__init__(A, B, s)
        self._kernel = kernel
        self._leaves = self.B.clone().requires_grad_(), self.s.clone().requires_grad_()
        self._grads = tuple(torch.zeros_like(t) for t in (self.A, self.B, self.s))
        self._last = (0, 0)

    def value(self, start: int, stop: int) -> Tensor:
        """See `KernelTiles.value`."""
        self._last = (start, stop)
        with torch.no_grad():
            return self._kernel.value(self.A[start:stop], self.B, self.s)

    def pull(self, grad: Tensor) -> None:
        """See `KernelTiles.pull`."""
        start, stop = self._last
        with torch.enable_grad():
            inputs = (self.A[start:stop].requires_grad_(), *self._leaves)
            found = torch.autograd.grad(self._kernel.value(*inputs), inputs, grad)
        self._grads[0][start:stop] = found[0]
        for total, part in zip(self._grads[1:], found[1:], strict=True):
            total += part

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `KernelTiles.gradients`."""
        grad_A, grad_B, grad_s = self._grads
        return grad_A, grad_B, grad_s


class _Half:
    """Euclidean distances over one part of the coordinates.

    Of few coordinates they come from plain differences: near pairs are common there, and it costs little. Of more,
    `|b - a|^2` is the product of `(b, |b|^2, 1)` and `(-2 a, 1, |a|^2)`, which is wrong by at most the root of the
    precision times `|a|`, and only where a and b are nearer to each other than that. Both are measured from the mean of
    B, since a shift that they share takes no part.
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        centre = B.mean(0)
        a, b = A - centre, B - centre
        # Products with a few rows are several times faster than products with a few columns.
        a, b = a.T.contiguous(), b.T.contiguous()
        one_a, one_b = a.new_ones(1, len(A)), b.new_ones(1, len(B))
        self._a, self._b = torch.cat((a, one_a)), torch.cat((b, one_b))
        self._direct = 0 < len(a) <= _FEW
        if not self._direct:
            self._columns = torch.cat((-2 * a, one_a, a.square().sum(0, keepdim=True)))
            self._rows = torch.cat((b, b.square().sum(0, keepdim=True), one_b)).T
        self._grad_a, self._grad_b = torch.zeros_like(self._a), torch.zeros_like(self._b)

    def distance(self, start: int, stop: int) -> Tensor:
        if not self._direct:
            return torch.mm(self._rows, self._columns[:, start:stop]).clamp_min_(0.0).sqrt_()
        rows, columns = self._b[:-1, :, None], self._a[:-1, start:stop]
        total = rows[0] - columns[0]
        if len(rows) == 1:
            return total.abs_()
        total.mul_(total)
        for row, column in zip(rows[1:], columns[1:], strict=True):
            difference = row - column
            total.addcmul_(difference, difference)
        return total.sqrt_()

    def pull(self, weight: Tensor, start: int, stop: int) -> None:
        """Take in `weight`, the gradient of the distances divided by them: each pulls along `a - b`."""
        torch.mm(self._b, weight, out=self._grad_a[:, start:stop])
        self._grad_b.addmm_(self._a[:, start:stop], weight.T)

    def gradients(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        return _pulled(self._a, self._grad_a, scale), _pulled(self._b, self._grad_b, scale)


def _pulled(factor: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """`(sum of the weights) a - (weighted sum of b)`, scaled, (n, q)."""
    return (scale * (grad[-1] * factor[:-1] - grad[:-1])).T


def _over(grad: Tensor, distance: Tensor) -> Tensor:
    """`grad / distance` in the place of the distances; 0 where there is none, which has no direction."""
    if distance.device.type == "cpu":
        # To look is cheaper than to write.
        nowhere = float(distance.amin()) == 0.0
        zero = distance == 0 if nowhere else None
        weight = torch.div(grad, distance, out=distance)
        return weight if zero is None else weight.masked_fill_(zero, 0.0)
    return distance.reciprocal_().nan_to_num_(0.0, 0.0, 0.0).mul_(grad)


class Distances(KernelTiles):
    """The piecewise and the mixed kernel with p = 2: two products and a dozen passes per tile."""

    def __init__(self, kernel: Kernel, A: Tensor, B: Tensor, s: Tensor, learn: bool) -> None:
        super().__init__(A, B, s)
        half = (A.shape[1] + 1) // 2
        A, B = self.A, self.B
        self.halves = _Half(A[:, :half], B[:, :half]), _Half(A[:, half:], B[:, half:])
        self._mixed = kernel.name == "mixed"
        self._learn = learn
        self._grad_s = torch.zeros_like(self.s)
        self._last: tuple[int, int, Tensor, Tensor] | None = None

    def value(self, start: int, stop: int) -> Tensor:
        """See `KernelTiles.value`."""
        first, second = (half.distance(start, stop) for half in self.halves)
        self._last = (start, stop, first, second)
        value = torch.mul(first, self.s[0]).addcmul_(second, self.s[1])
        if self._mixed:
            value += self._shares(value).mul_(self.s[2]) + self.s[4]
        return value

    def _shares(self, base: Tensor) -> Tensor:
        return torch.softmax(base / _temperature(self.s[3]), 0)

    def pull(self, grad: Tensor) -> None:
        """See `KernelTiles.pull`."""
        assert self._last is not None
        start, stop, *distances = self._last
        self._last = None
        if self._mixed:
            grad = self._through_softmax(grad, distances[0] * self.s[0] + distances[1] * self.s[1])
        for i, (half, distance) in enumerate(zip(self.halves, distances, strict=True)):
            if self._learn:
                self._grad_s[i] += (grad * distance).sum()
            half.pull(_over(grad, distance), start, stop)

    def _pulls(self) -> Tensor:
        """What the gradients of the halves are still to be multiplied by."""
        return self.s[:2]

    def _through_softmax(self, grad: Tensor, base: Tensor) -> Tensor:
        """From the gradient of the mixed kernel to that of the piecewise one in it."""
        temperature = _temperature(self.s[3])
        shares = self._shares(base)
        weighted = shares * grad
        along = weighted.sum(0)
        self._grad_s[2] += along.sum()
        self._grad_s[4] += grad.sum()
        inner = weighted.sub_(shares.mul_(along)).mul_(self.s[2] / temperature)
        sign = torch.sign(self.s[3]) * (self.s[3].abs() > _COLDEST)
        self._grad_s[3] -= sign * (inner * base).sum() / temperature
        return grad.add_(inner)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `KernelTiles.gradients`."""
        (a1, b1), (a2, b2) = (half.gradients(s) for half, s in zip(self.halves, self._pulls(), strict=True))
        return torch.cat((a1, a2), 1), torch.cat((b1, b2), 1), self._grad_s


def _temperature(g: Tensor) -> Tensor:
    return g.abs().clamp_min(_COLDEST)
