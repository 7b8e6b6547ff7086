"""Every backward that is written by hand, in float64 against differences: none can be added without its check."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import Function, gradcheck

import autopeft
from autopeft.methods._dense_gradient import DenseGradient
from autopeft.methods._fastfood import Fastfood, _Down, _Up
from autopeft.methods._kernels import Kernel
from autopeft.methods._l1 import L1OfProduct
from autopeft.methods._masked import MaskedChange
from autopeft.methods._sparse import SparseConv, SparseLinear
from autopeft.methods._sparsifiers import Cut, Sparsifier
from autopeft.methods._tiles import Change, DenseProduct, Geometry, TiledProduct
from autopeft.methods.ramt import _Step
from autopeft.regularisers.nuclear_norm import _Nuclear

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""A function of float64 tensors, and where its gradients are compared with differences."""

CONV = ((2, 1), (1, 0), (1, 2), 2)
"""Stride, padding, dilation, groups."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def sparse_linear() -> Case:
    rows, columns = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 0, 2, 1])
    touched = torch.tensor([1, 3, 4])
    return lambda x, v: SparseLinear.apply(x, v, rows, columns, 4, touched), (drawn(2, 3, 6), drawn(4))


def sparse_conv() -> Case:
    index = torch.tensor([0, 5, 17, 40, 71])
    return lambda x, v: SparseConv.apply(x, v, index, (6, 2, 2, 3), *CONV), (drawn(2, 4, 6, 7), drawn(5))


def snell(product: type[Function]) -> Callable[[], Case]:
    def case() -> Case:
        geometry = Geometry((5, 6))
        kernel = Kernel("mixed")
        change = Change(kernel, Sparsifier("soft"), 12, True, 7, 20)
        A, B, s = drawn(6, 4), drawn(5, 4), torch.tensor(kernel.start(0.5), dtype=torch.float64).requires_grad_()
        ordered = kernel.value(A, B, s).detach().abs().flatten().sort().values
        # Between two magnitudes, where the change has no jump.
        cut = Cut((ordered[17] + ordered[18]) / 2, 0)
        if product is TiledProduct:
            rest = (None, torch.randn(5, 6).double(), None, change, geometry, cut)
            return lambda *given: TiledProduct.apply(*given, *rest), (drawn(3, 6), A, B, s)
        whole = Change(kernel, Sparsifier("none"), 30, True, 7, 20)
        return lambda *given: DenseProduct.apply(*given, None, whole, geometry), (drawn(3, 6), A, B, s)

    return case


def fastfood(way: type[Function], size: int) -> Callable[[], Case]:
    def case() -> Case:
        projection = Fastfood(30, 13)
        projection.draw(0, torch.device("cpu"))
        return lambda given: way.apply(given, projection, 5, 29), (drawn(size),)

    return case


def l1_of_product() -> Case:
    return L1OfProduct.apply, (drawn(5, 2), drawn(7, 2))


def nuclear() -> Case:
    return lambda matrix: _Nuclear.apply(matrix, None), (drawn(4, 6),)


def dense_gradient() -> Case:
    """Of y, which it hands on; the anchor takes no part in the value."""
    x = torch.randn(3, 6).double()
    plan = (lambda gradient: None, (4, 6), None)
    return lambda y, anchor: DenseGradient.apply(y, x, anchor, *plan), (drawn(3, 4), drawn())


def masked_input() -> Case:
    """Of x alone: what the logits get is not the derivative of their step."""
    logits, weight = torch.randn(2, 5, 6).double(), torch.randn(5, 6).double()
    return lambda x: MaskedChange.apply(x, logits, weight, 0.7, 0.4), (drawn(2, 3, 6),)


CASES: dict[type[Function], Callable[[], Case]] = {
    SparseLinear: sparse_linear,
    SparseConv: sparse_conv,
    TiledProduct: snell(TiledProduct),
    DenseProduct: snell(DenseProduct),
    _Down: fastfood(_Down, 13),
    _Up: fastfood(_Up, 24),
    L1OfProduct: l1_of_product,
    _Nuclear: nuclear,
    DenseGradient: dense_gradient,
    MaskedChange: masked_input,
}

STRAIGHT_THROUGH: frozenset[type[Function]] = frozenset({MaskedChange, _Step})
"""Whose gradient is by definition that of another function: compared with it below."""


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_gradcheck(function: type[Function]) -> None:
    torch.manual_seed(0)
    run, inputs = CASES[function]()
    assert gradcheck(run, inputs)


def test_masked_logits_learn_as_the_sigmoid_does() -> None:
    torch.manual_seed(0)
    x, logits, weight = drawn(2, 3, 6), drawn(2, 5, 6), torch.randn(5, 6).double()
    up = torch.randn(2, 3, 5).double()
    (found,) = torch.autograd.grad(MaskedChange.apply(x, logits, weight, 0.7, 0.4), logits, up)
    soft = torch.bmm(x, ((torch.sigmoid(logits / 0.7) - 1) * weight).mT)
    torch.testing.assert_close(found, torch.autograd.grad(soft, logits, up)[0], rtol=1e-12, atol=1e-12)


def test_a_step_learns_as_the_identity_does() -> None:
    scores, up = drawn(7), torch.randn(7).double()
    (found,) = torch.autograd.grad(_Step.apply(scores, 0.1), scores, up)
    torch.testing.assert_close(found, up, rtol=0, atol=0)


def test_no_backward_goes_unchecked() -> None:
    root = Path(autopeft.__file__).parent
    written = {
        node.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] == "Function" for base in node.bases)
    }
    assert written == {f.__name__ for f in (*CASES, *STRAIGHT_THROUGH)}
