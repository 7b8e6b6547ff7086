"""A process that trains a plan of many methods and may be killed in the middle, or reads its export back.

    python mixed_process.py train PLAN FOLDER [EPOCH]    killed after EPOCH epochs
    python mixed_process.py reload PLAN FOLDER           the native export, in a process that knows nothing else

`train` writes `logits.pt` and the exports into FOLDER; `reload` writes `reloaded.pt`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from autopeft.allocation.indices import attach_indices
from autopeft.backends.hf_peft import HfPeftBackend
from autopeft.config.registries import METHODS as REGISTERED
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.export.native import NativeExport
from autopeft.export.timm import TimmExport
from autopeft.export.verify import verify_all
from autopeft.methods.hf_peft import HfPeft
from autopeft.methods.sparse import Sparse
from autopeft.pipeline.restore import restore
from autopeft.scoring.gradient import Gradient
from autopeft.testing._export_ground import ExportGround, small_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training.checkpoint import Checkpoint
from autopeft.training.loop import fit
from autopeft.training.settings import TrainSettings

EPOCHS = 4

MERGEABLE = [
    ("blocks.0.mlp.fc1", "lora", 2),
    ("blocks.0.mlp.fc1", "ssf", 1),
    ("blocks.0.mlp.fc1", "bias", 1),
    ("blocks.0.attn.qkv[q]", "core", 3),
    ("blocks.0.attn.qkv[v]", "dora", 1),
    ("blocks.0.mlp.fc2", "lokr", 2),
    ("blocks.1.mlp.fc2", "s2ft", 16),
    ("blocks.1.mlp.fc1", "bit_lora", 2),
    ("*:attn.proj", "shared_core", 3),
    ("blocks.1.attn.qkv", "sparse", 24),
    ("blocks.1.norm1", "norm", 1),
]
"""Three slots of one site, slices, packed bits, a layer of PEFT, a shared matrix, chosen entries and frequencies."""

PLANS = {
    "mergeable": MERGEABLE,
    "any": [*MERGEABLE, ("blocks.0.mlp", "adaptformer", 2), ("blocks.1", "vpt", 2), ("blocks.0.attn", "convpass", 1)],
}


def methods_of(keys: list[str]) -> dict[str, Method]:
    named: dict[str, Method] = {"lokr": HfPeft("lokr"), "sparse": Sparse()}
    return {key: named.get(key) or REGISTERED[key]() for key in dict.fromkeys(keys)}


def allocation_of(ground: ExportGround, choices: list[tuple[str, str, int]], methods: dict[str, Method]) -> Allocation:
    options = []
    for name, key, size in choices:
        site, method = ground.catalog[name], methods[key]
        places = places_of(ground.catalog, method, site)
        assert places, f"{key} cannot be used on {name}"
        options.append(Option(name, key, size, method.cost(site, size), 1.0, places))
    scores = Gradient().score(ground.model, ground.catalog, task())
    groups = {site.name: site for site in ground.catalog.groups()}
    return attach_indices(Allocation(tuple(options), Budget(10**6)), methods, scores, groups)


def task() -> ToyTask:
    return ToyTask(size=28)


def main(mode: str, plan: str, folder: Path, kill_after: int) -> None:
    ground = small_vit()
    methods = methods_of([key for _, key, _ in PLANS[plan]])
    allocation = allocation_of(ground, PLANS[plan], methods)
    seed = 7 if mode == "train" else 8
    with HfPeftBackend().insert(ground.model, ground.catalog, allocation, methods, seed) as inserted:
        if mode == "reload":
            restore(inserted, folder / "native" / "adapter.safetensors")
            torch.save(ground.logits(inserted), folder / "reloaded.pt")
            return

        def die(epoch: int, value: float) -> bool:
            if epoch == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        settings = TrainSettings(epochs=EPOCHS, threads=1)
        checkpoint = Checkpoint(folder / "checkpoint", every_seconds=0)
        found = fit(
            inserted, task(), settings, methods=methods, seed=3, device="cpu", on_epoch=die, checkpoint=checkpoint
        )
        assert found.epochs == EPOCHS
        logits = ground.logits(inserted)
        torch.save({"logits": logits, "losses": found.losses}, folder / "logits.pt")
        NativeExport().export(inserted, ground.record, folder / "native")
        if not TimmExport().supports(inserted):
            TimmExport().export(inserted, ground.record, folder / "timm")
            apart = verify_all(
                {"timm": folder / "timm"}, ground.images, logits, inserted=inserted, record=ground.record
            )
            (folder / "timm.txt").write_text(str(apart["timm"]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
