"""What a step of tiled SNELL spends where: nanoseconds of processor time per entry of a weight, on one Linear of ViT-B.

    python studies/kernels/parts.py --output studies/kernels/parts_cpu.json

The weight is fc1's (3072 x 768), the batches 8 and 32 pictures of 197 tokens. Parts, each the fastest of several calls
taken in turn with the others: the threshold of slowly changing factors (a step lies between two calls), and from
nothing; the forward, with a threshold; the backward; and beside them the three dense products of full fine-tuning (`y =
x W^T`, the gradient of x, the gradient of W), the first two of which LoRA takes as well; forward and backward of LoRA
at the same rank. What was tried to make SNELL cheaper: panels of at most 2^20 entries, which the products were cut into
before; smaller and larger tiles; the gradient of W at a tenth of the entries alone, as a sampled product in blocks of
tokens; and how many columns, and blocks of 64 rows in a column, hold no kept entry, so that a product could leave them
out. CPU only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autopeft.core.menu import Option
from autopeft.core.site import Place, Site
from autopeft.methods._bracket import Bracket
from autopeft.methods.base import Adapter
from autopeft.methods.lora import LoRA
from autopeft.methods.snell import SNELL, SNELLAdapter
from autopeft.store.atomic import write_json

OUT, IN, TOKENS = 3072, 768, 197
MOVE = 1e-3
"""How far every factor entry moves between two calls, as a step of Adam at this rate does."""

BLOCK = 512
"""Tokens of a block of the sampled product."""

ROWS = 64
"""Rows of a block of the weight that a product could leave out."""

WAYS = {
    "": {},
    ", narrow panels": {"panel": 1 << 20},
    ", small tiles": {"tile": 1 << 15},
    ", large tiles": {"tile": 1 << 19},
}
"""Widths of the tiles and panels, in entries, as attributes of the adapter."""


SITE = Site("host", "", "linear", (OUT, IN), True, 0, "mlp.fc1", ("weight", "bias"))


def adapter_on(host: nn.Linear, rank: int) -> SNELLAdapter:
    """SNELL at its defaults, with the outputs parted as after some steps."""
    method, site = SNELL(), SITE
    option = Option("host", "m", rank, method.cost(site, rank), 0.0, (Place("host", "weight"),))
    adapter = method.build(site, option, host, torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapter.B.add_(torch.randn_like(adapter.B), alpha=0.02)
    return adapter


def fastest(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest call of each, in turn."""
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.process_time()
            part()
            best[name] = min(best[name], time.process_time() - start)
    return best


def sampled(x: Tensor, grad: Tensor, pattern: Tensor) -> Tensor:
    """The gradient of the entries of a pattern (out, in); other entries are not computed."""
    for i in range(0, len(x), BLOCK):
        pattern = torch.sparse.sampled_addmm(pattern, grad[i : i + BLOCK].mT, x[i : i + BLOCK])
    return pattern


def measured(batch: int, rank: int, rounds: int) -> dict[str, float]:
    """Nanoseconds per entry of the weight."""
    torch.manual_seed(0)
    host = nn.Linear(IN, OUT).requires_grad_(False)
    adapter = adapter_on(host, rank)
    x, grad = torch.randn(batch * TOKENS, IN), torch.randn(batch * TOKENS, OUT)
    A, B, scalars, _ = (None if t is None else t.detach() for t in adapter._inputs())
    assert A is not None
    assert B is not None
    assert scalars is not None
    change = adapter._change(adapter.geometry.scalars(x))
    bracket = Bracket()

    def threshold(known: Bracket | None) -> None:
        change.cut(A, B, scalars, adapter.geometry, known)

    def moved() -> None:
        with torch.no_grad():
            B.add_(torch.randn_like(B).sign_(), alpha=MOVE)
        threshold(bracket)

    pattern = (torch.rand(OUT, IN) < 0.1).float().to_sparse_csr()
    x.requires_grad_()
    moved()
    parts: dict[str, Callable[[], object]] = {
        "threshold, slowly changing": moved,
        "threshold, from nothing": lambda: threshold(None),
        "product y": lambda: torch.mm(x, host.weight.T),
        "product dx": lambda: torch.mm(grad, host.weight),
        "product dW": lambda: torch.mm(x.T, grad),
        "product dW, sampled at 0.1": lambda: sampled(x.detach(), grad, pattern),
    }
    found = fastest(parts, rounds)
    usual = {name: getattr(adapter, name) for name in ("tile", "panel")}
    lora = lora_on(host, rank)
    for _ in range(rounds):
        for way, widths in WAYS.items():
            for name, value in {**usual, **widths}.items():
                setattr(adapter, name, value)
            stepped(found, way, lambda: adapter.around(host.forward, x), grad)
        stepped(found, " of lora", lambda: host(x) + lora.branch(x), grad)
    result = {name: round(seconds / (OUT * IN) * 1e9, 2) for name, seconds in found.items()}
    for name, value in usual.items():
        setattr(adapter, name, value)
    kept = adapter.delta()["weight"].detach() != 0
    result["columns without a kept entry"] = round(1 - float(kept.any(0).float().mean()), 4)
    result[f"blocks of {ROWS} rows in a column without one"] = round(
        1 - float(kept.view(-1, ROWS, IN).any(1).float().mean()), 4
    )
    return result


def lora_on(host: nn.Linear, rank: int) -> Adapter:
    method = LoRA()
    option = Option("host", "m", rank, method.cost(SITE, rank), 0.0, (Place("host", "weight"),))
    return method.build(SITE, option, host, torch.Generator().manual_seed(0))


def stepped(found: dict[str, float], way: str, forward: Callable[[], Tensor], grad: Tensor) -> None:
    """Take the fastest forward and backward of a way into what was found."""
    start = time.process_time()
    y = forward()
    middle = time.process_time()
    y.backward(grad)
    end = time.process_time()
    for name, seconds in ((f"forward{way}", middle - start), (f"backward{way}", end - middle)):
        found[name] = min(found.get(name, np.inf), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"rank": args.rank, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for batch in args.batches:
        result[f"batch {batch}"] = measured(batch, args.rank, args.rounds)
        print(batch, result[f"batch {batch}"], flush=True)
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
