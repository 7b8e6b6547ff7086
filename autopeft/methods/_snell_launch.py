"""The launch of `_snell_triton`: imported where Triton is installed and a CUDA device is at hand."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,valid-type,name-defined,misc"
# A launch is written in Triton's language, which a type checker takes for Python.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["tile"]


@triton.jit
def tile(
    a_ptr,
    b_ptr,
    s_ptr,
    offset_ptr,
    level_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    out,
    n,
    bound,
    rank: tl.constexpr,
    half: tl.constexpr,
    mode: tl.constexpr,
    sparsifier: tl.constexpr,
    shifted: tl.constexpr,
    block: tl.constexpr,
):
    """One block of a tile (out, n) from rows of A (n, rank) and B (out, rank).

    mode 0 writes the kernel; 1 the change, `mask (f(K) - v)`; 2, from the gradient of the change, what the distances of
    the two halves are pulled with. sparsifier: 0 soft, 1 square, 2 hard, 3 none.
    """
    j = tl.program_id(0) * block + tl.arange(0, block)
    i = tl.program_id(1) * block + tl.arange(0, block)
    inside = (j < out)[:, None] & (i < n)[None, :]
    place = j.to(tl.int64)[:, None] * n + i[None, :]
    d0 = tl.zeros((block, block), dtype=tl.float32)
    d1 = tl.zeros((block, block), dtype=tl.float32)
    for c in tl.static_range(rank):
        a = tl.load(a_ptr + i * rank + c, mask=i < n, other=0.0)
        b = tl.load(b_ptr + j * rank + c, mask=j < out, other=0.0)
        difference = b[:, None] - a[None, :]
        if c < half:
            d0 += difference * difference
        else:
            d1 += difference * difference
    d0, d1 = tl.sqrt(d0), tl.sqrt(d1)
    s0, s1 = tl.load(s_ptr), tl.load(s_ptr + 1)
    kernel = s0 * d0 + s1 * d1
    if mode == 0:
        tl.store(first_ptr + place, kernel, mask=inside)
    else:
        magnitude = tl.abs(kernel)
        level = tl.load(level_ptr)
        kept = inside
        if sparsifier != 3:
            number = i.to(tl.int64)[None, :] * out + j[:, None]
            kept = (magnitude > level) | ((magnitude == level) & (number < bound))
        if mode == 1:
            change = kernel
            if sparsifier == 0:
                change = kernel * (magnitude - level)
            elif sparsifier == 1:
                change = kernel * magnitude
            if shifted:
                change -= tl.load(offset_ptr + i, mask=i < n, other=0.0)[None, :]
            tl.store(first_ptr + place, tl.where(kept, change, 0.0), mask=inside)
        else:
            grad = tl.where(kept, tl.load(grad_ptr + place, mask=inside, other=0.0), 0.0)
            if sparsifier == 0:
                grad *= 2 * magnitude - level
            elif sparsifier == 1:
                grad *= magnitude
            # No direction where there is no distance.
            tl.store(first_ptr + place, tl.where(d0 > 0, grad * s0 / d0, 0.0), mask=inside)
            tl.store(second_ptr + place, tl.where(d1 > 0, grad * s1 / d1, 0.0), mask=inside)
