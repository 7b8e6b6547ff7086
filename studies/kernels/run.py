"""Peak memory and step time of sparse tuning beside LoRA and full fine-tuning, on vision transformers of four sizes.

    python studies/kernels/run.py --models vit_base_patch16_224 --batch 8 --depth 2
    python studies/kernels/run.py --device cuda --depth 0

Random weights and images; every contestant on the same matrices (qkv, proj, fc1, fc2 of every block), AdamW, one head
of ten classes that all of them train. A step is forward, backward and optimizer. Memory counts weights, gradients,
optimizer and activations: on the CPU the bytes of live tensors (`autopeft.testing.memory`), on CUDA the allocator's
peak. Times are the fastest of a few steps, the contestants in turn in every round, so that a busy machine is unfair to
none; on the CPU processor time. Contestants:

- `floor`: nothing on the matrices; the gradient still runs down to the patches, as below every adapter.
- `full`: every weight is trained.
- `mask D`: every matrix is trained and its gradient multiplied with a dense mask of density D (as GPS does).
- `sparse D`: the house's sparse entries at random positions, SPT's unstructured part.
- `lora R`, `snell R`: without a dense matrix; `snell R reference`: made dense in the forward and again in the
  backward.

Writes `DEVICE.json` beside itself, contestants with their ratios to the floor and to the LoRA of the same rank, or of
rank 8. `--depth` shortens the models where time or memory is short, and the result says so; 0 leaves them whole.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.places import places_of
from autopeft.core.site import Catalog, Site
from autopeft.methods.lora import LoRA
from autopeft.methods.snell import SNELL
from autopeft.methods.sparse import Sparse
from autopeft.models.scan import scan
from autopeft.store.atomic import read_json, write_json
from autopeft.testing.memory import LiveBytes

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
RANKS = (8, 16, 32)
DENSITIES = (0.0001, 0.001, 0.005, 0.01, 0.05)
STEPS = 2

Contestant = Callable[[nn.Module, Catalog], Any]
"""Yields the model to run and what is trained, as a context manager."""


def matrices(catalog: Catalog) -> list[Site]:
    return [site for site in catalog if site.role in ROLES and not site.parent]


def adapters(method: Method, size: Callable[[Site], int]) -> Contestant:
    """One method on every matrix, at the size that it has there."""

    @contextmanager
    def enter(model: nn.Module, catalog: Catalog) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        options = []
        for site in matrices(catalog):
            n = size(site)
            indices = None
            if isinstance(method, Sparse):
                chosen = np.random.default_rng(0).choice(site.n_weight, n, replace=False)
                indices = Indices(np.sort(chosen).astype(np.int64))
            places = places_of(catalog, method, site)
            options.append(Option(site.name, "m", n, method.cost(site, n), 0.0, places, indices))
        plan = Allocation(tuple(options), Budget(10**12))
        with Native().insert(model, catalog, plan, {"m": method}) as inserted:
            inserted.train_mode()
            yield inserted.model, [p for group in inserted.groups().values() for p in group]

    return enter


@contextmanager
def floor(model: nn.Module, catalog: Catalog) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The head alone is trained, and the gradient runs down to the patches all the same."""
    model.requires_grad_(False)
    head = [p.requires_grad_() for path in catalog.head for p in model.get_submodule(path).parameters()]
    hook = model.get_submodule("patch_embed").register_forward_hook(lambda m, a, y: y.detach().requires_grad_())
    yield model, head
    hook.remove()


@contextmanager
def full(model: nn.Module, catalog: Catalog) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    model.requires_grad_(True)
    start = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    yield model, list(model.parameters())
    model.load_state_dict(start)
    model.requires_grad_(False)


def masked(density: float) -> Contestant:
    @contextmanager
    def enter(model: nn.Module, catalog: Catalog) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        model.requires_grad_(False)
        trained, hooks = [], []
        start = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        for path in catalog.head:
            trained += [p.requires_grad_() for p in model.get_submodule(path).parameters()]
        for site in matrices(catalog):
            weight = model.get_submodule(site.module).get_parameter("weight").requires_grad_()
            mask = torch.rand_like(weight) < density
            hooks.append(weight.register_hook(lambda grad, mask=mask: grad * mask))
            trained.append(weight)
        yield model, trained
        for hook in hooks:
            hook.remove()
        model.load_state_dict(start)
        model.requires_grad_(False)

    return enter


def contestants() -> dict[str, Contestant]:
    found: dict[str, Contestant] = {"floor": floor, "full": full, "mask 0.01": masked(0.01)}
    for density in DENSITIES:
        found[f"sparse {density:g}"] = adapters(Sparse(), lambda s, d=density: max(1, round(d * s.n_weight)))
    for rank in RANKS:
        found[f"lora {rank}"] = adapters(LoRA(), lambda s, r=rank: r)
        found[f"snell {rank}"] = adapters(SNELL(), lambda s, r=rank: r)
        found[f"snell {rank} reference"] = adapters(SNELL(implementation="reference"), lambda s, r=rank: r)
    return found


def held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class Steps:
    """Training steps of one contestant on a model."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], images: Tensor) -> None:
        self._model, self._images = model, images
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self._cuda = images.is_cuda

    def run(self) -> None:
        self._optimizer.zero_grad()
        self._model(self._images).float().square().mean().backward()
        self._optimizer.step()

    def seconds(self) -> float:
        clock = time.perf_counter if self._cuda else time.process_time
        if self._cuda:
            torch.cuda.synchronize()
        start = clock()
        self.run()
        if self._cuda:
            torch.cuda.synchronize()
        return clock() - start


def peak_of(enter: Contestant, model: nn.Module, catalog: Catalog, images: Tensor) -> tuple[int, int]:
    """Most bytes at a time in two steps, the second one with the optimizer's state, and what is trained."""
    gc.collect()
    with enter(model, catalog) as (inserted, parameters):
        trained = sum(p.numel() for p in parameters)
        steps = Steps(inserted, parameters, images)
        if images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            steps.run()
            steps.run()
            return torch.cuda.max_memory_allocated(), trained
        with LiveBytes([*held(inserted), images]) as seen:
            steps.run()
            steps.run()
        return seen.peak, trained


def times_of(
    entering: dict[str, Contestant], model: nn.Module, catalog: Catalog, images: Tensor, rounds: int
) -> dict[str, float]:
    """The fastest step of each, in turn."""
    best = dict.fromkeys(entering, float("inf"))
    for _ in range(rounds):
        for name, enter in entering.items():
            with enter(model, catalog) as (inserted, parameters):
                steps = Steps(inserted, parameters, images)
                steps.run()
                best[name] = min(best[name], *(steps.seconds() for _ in range(STEPS)))
    return best


def measured(name: str, depth: int, batch: int, rounds: int, device: str, only: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    changes = {"depth": depth} if depth else {}
    model = timm.create_model(name, num_classes=10, **changes).to(device).eval().requires_grad_(False)
    images = torch.randn(batch, 3, 224, 224, device=device)
    catalog = scan(model)
    entering = {key: enter for key, enter in contestants().items() if not only or {key, key.split()[0]} & {*only}}
    rows: dict[str, dict[str, Any]] = {}
    for key, enter in entering.items():
        peak, trained = peak_of(enter, model, catalog, images)
        rows[key] = {"trained": trained, "peak_mb": round(peak / 1e6, 2)}
    if rounds:
        for key, seconds in times_of(entering, model, catalog, images, rounds).items():
            rows[key]["seconds"] = round(seconds, 4)
    for key, row in rows.items():
        kind, _, rest = key.partition(" ")
        rank = rest.split()[0] if kind in ("lora", "snell") else "8"
        for field in ("peak_mb", "seconds"):
            for other, label in (("floor", "floor"), (f"lora {rank}", "lora")):
                if field in row and other in rows:
                    row[f"{field}_over_{label}"] = round(row[field] / rows[other][field], 4)
        print(f"{name} {key}: {row}", flush=True)
    blocks = len(model.get_submodule("blocks"))
    return {"depth": blocks, "whole": not depth, "batch": batch, "rounds": rounds, "contestants": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=0, help="blocks to keep; 0 for all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timed steps; 0 measures memory alone")
    parser.add_argument("--only", nargs="*", default=[], help="kinds or contestants: floor, snell, 'lora 8'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    path = given.output / f"{given.device.partition(':')[0]}.json"
    result = read_json(path) if path.exists() else {"results": {}}
    result["device"] = torch.cuda.get_device_name(given.device) if cuda else processor()
    result["threads"] = torch.get_num_threads()
    result["versions"] = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    for name in given.models:
        found = measured(name, given.depth, given.batch, given.rounds, given.device, given.only)
        key = f"{name} depth {found['depth']} batch {given.batch}" + ("" if given.rounds else " memory")
        result["results"][key] = found
        write_json(path, result)


def processor() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
