"""Which product with a sparse weight is cheapest at which density, forward and backward.

    python studies/kernels/density.py [--device cpu] [--repeats 3]

Times single ways of doing what `autopeft.methods._sparse` does, at random positions, on a linear layer of ViT-B's MLP
and a 3x3 convolution, one image size each; the smallest of the repeats counts. Writes `density_DEVICE.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autopeft.methods import _sparse

DENSITIES = (1e-4, 1e-3, 5e-3, 1e-2, 5e-2, 2e-1)
CHUNKS = (1 << 18, 1 << 20, 1 << 22)
LINEAR = (3072, 768)
TOKENS = 8 * 197
CONV = (256, 256, 3, 3)
MAP = (8, 256, 14, 14)


def seconds(work: Callable[[], object], repeats: int, device: str) -> float | str:
    """The fastest run after one to warm up; what went wrong, where a way is not to be had."""
    best = float("inf")
    for number in range(repeats + 1):
        start = time.perf_counter()
        try:
            work()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        if device == "cuda":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return round(best, 6)


def linear_ways(n: int, device: str) -> dict[str, Callable[[], object]]:
    """The product, and the gradient of the entries, of a linear layer."""
    out, inner = LINEAR
    x, grad = torch.randn(TOKENS, inner, device=device), torch.randn(TOKENS, out, device=device)
    index = torch.randperm(out * inner)[:n].sort().values.to(device)
    values = torch.randn(n, device=device)
    row, col = index // inner, index % inner
    rows, row_of = torch.unique(row, return_inverse=True)
    columns, col_of = torch.unique(col, return_inverse=True)

    def scattered() -> Tensor:
        return values.new_zeros(out * inner).index_put((index,), values).view(out, inner)

    def block() -> Tensor:
        small = values.new_zeros(len(rows), len(columns)).index_put((row_of, col_of), values)
        return x.new_zeros(TOKENS, out).index_copy_(-1, rows, F.linear(x.index_select(-1, columns), small))

    def chunked(way: Callable[..., Tensor], chunk: int) -> Callable[[], Tensor]:
        def work() -> Tensor:
            kept, _sparse._CHUNK = _sparse._CHUNK, chunk
            try:
                return way(grad, x, row, col, grad.dtype)
            finally:
                _sparse._CHUNK = kept

        return work

    ways: dict[str, Callable[[], object]] = {
        "forward, dense": lambda: F.linear(x, scattered()),
        "forward, touched block": block,
        "forward, csr": lambda: _sparse._product(x, values, row, col, out),
        "entries, dense gradient": lambda: (grad.mT @ x).flatten()[index],
    }
    for chunk in CHUNKS:
        size = f"2^{chunk.bit_length() - 1}"
        ways[f"entries, sampled_addmm by {size}"] = chunked(_sparse._sampled, chunk)
        if n <= 0.002 * out * inner:
            ways[f"entries, gathered by {size}"] = chunked(_sparse._gathered, chunk)
    return ways


def conv_ways(n: int, device: str) -> dict[str, Callable[[], object]]:
    """The gradient of the entries of a convolution."""
    x = torch.randn(MAP, device=device)
    grad = torch.randn(MAP[0], CONV[0], *MAP[2:], device=device)
    index = torch.randperm(torch.Size(CONV).numel())[:n].sort().values.to(device)
    kernel = torch.zeros(CONV, device=device)
    geometry = ((1, 1), (1, 1), (1, 1), 1)

    def dense() -> Tensor:
        stride, padding, dilation, groups = geometry
        wanted = (False, True, False)
        found = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, stride, padding, dilation, False, (0, 0), groups, wanted
        )
        entries: Tensor = found[1].flatten()[index]
        return entries

    ways: dict[str, Callable[[], object]] = {"entries, dense gradient": dense}
    if n <= 0.02 * kernel.numel():
        ways["entries, gathered"] = lambda: _sparse.gathered_conv(grad, x, index, CONV, *geometry, grad.dtype)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, dict[str, dict[str, float | str]]] = {"linear": {}, "conv": {}}
    for name, shape, ways in (("linear", LINEAR, linear_ways), ("conv", CONV, conv_ways)):
        for density in DENSITIES:
            n = max(1, round(density * torch.Size(shape).numel()))
            timed = {way: seconds(work, given.repeats, given.device) for way, work in ways(n, given.device).items()}
            found[name][f"{density:g}"] = timed
    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or platform.machine()
    result = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "shapes": {"linear": LINEAR, "conv": CONV, "map": MAP},
        "seconds": found,
    }
    Path(__file__).with_name(f"density_{given.device}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
