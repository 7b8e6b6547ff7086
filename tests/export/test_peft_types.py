"""Plans of one adapter type of PEFT leave as that type, and PEFT alone loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from autopeft.backends.hf_peft import HfPeftBackend
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Inserted, Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.export.peft import PeftExport
from autopeft.export.peft_init import PeftInitExport
from autopeft.methods._peft_tuners import TUNERS
from autopeft.methods.hf_peft import HfPeft
from autopeft.methods.lora import LoRA
from autopeft.methods.ssf import SSF
from autopeft.testing._export_ground import ExportGround, small_vit

# torch warns once when a sparse tensor is made without saying whether to check it, as SHiRA does.
# PEFT tries to compile BOFT's kernel whether there is a device or not.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks", "ignore:Failed to load the CUDA", "ignore:Setting boft_n"
)

REPRESENTATIVE = ("dora", "fourierft", "hira", "ia3", "ln_tuning", "lokr", "lora_ga", "pissa", "shira")
NOT_EXPORTED = {"frod", "lily", "pvera", "randlora", "tinylora", "unilora", "vblora", "vera"}
OTHERS = sorted(set(TUNERS) - set(REPRESENTATIVE) - NOT_EXPORTED)
FC1 = ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1")


def exported(methods: dict[str, Method], choices: list[tuple[str, str, int]], folder: Path) -> tuple[ExportGround, Any]:
    """Export a disturbed plan; the ground and its logits."""
    ground = small_vit()
    with inserted_plan(ground, methods, choices) as inserted:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for group in inserted.groups().values():
                for p in group:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))
        assert PeftExport().supports(inserted) == ""
        PeftExport().export(inserted, ground.record, folder)
        return ground, ground.logits(inserted)


def inserted_plan(ground: ExportGround, methods: dict[str, Method], choices: list[tuple[str, str, int]]) -> Any:
    options = []
    for name, key, size in choices:
        site, method = ground.catalog[name], methods[key]
        places = places_of(ground.catalog, method, site)
        options.append(Option(name, key, size, method.cost(site, size), 0.0, places))
    return HfPeftBackend().insert(ground.model, ground.catalog, Allocation(tuple(options), Budget(10**9)), methods)


def loaded(ground: ExportGround, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    base = timm.create_model(f"local-dir:{folder / 'base'}", pretrained=True)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ground.images)
    return logits


def round_trip(tuner: str, folder: Path) -> None:
    method = HfPeft(tuner)
    site = small_vit().catalog[FC1[0]]
    size = max(s for s in method.sizes(site) if s <= 8)
    ground, expected = exported({"it": method}, [(name, "it", size) for name in FC1], folder)
    torch.testing.assert_close(loaded(ground, folder), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tuner", REPRESENTATIVE)
def test_peft_loads_a_plan_of_one_type(tuner: str, tmp_path: Path) -> None:
    round_trip(tuner, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", OTHERS)
def test_peft_loads_a_plan_of_every_other_type(tuner: str, tmp_path: Path) -> None:
    round_trip(tuner, tmp_path)


@pytest.mark.parametrize(("tuner", "pattern"), [("loha", "rank_pattern"), ("fourierft", "n_frequency_pattern")])
def test_sizes_that_differ_become_patterns(tuner: str, pattern: str, tmp_path: Path) -> None:
    ground, expected = exported({"it": HfPeft(tuner)}, [(FC1[0], "it", 2), (FC1[1], "it", 4)], tmp_path)
    torch.testing.assert_close(loaded(ground, tmp_path), expected, atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config[pattern].values()) == [2, 4]
    assert config["modules_to_save"] == ["head"]


def test_native_lora_in_peft_layers_leaves_as_lora(tmp_path: Path) -> None:
    ground, expected = exported({"it": LoRA()}, [(FC1[0], "it", 2), (FC1[1], "it", 4)], tmp_path)
    torch.testing.assert_close(loaded(ground, tmp_path), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("methods", "choices", "reason"),
    [
        ({"a": HfPeft("hra"), "b": HfPeft("ia3")}, [(FC1[0], "a", 4), (FC1[1], "b", 1)], "hra and ia3"),
        ({"a": HfPeft("hra")}, [(FC1[0], "a", 4), (FC1[1], "a", 2)], "no pattern for it"),
        ({"a": HfPeft("vera")}, [(FC1[0], "a", 4)], "random projections of its own"),
        ({"a": HfPeft("lily")}, [(FC1[0], "a", 2)], "cannot merge lily"),
        ({"a": HfPeft("hra"), "b": SSF()}, [(FC1[0], "a", 4), (FC1[1], "b", 1)], "is no layer of PEFT"),
    ],
)
def test_what_a_folder_of_peft_cannot_hold_is_said(
    methods: dict[str, Method], choices: list[tuple[str, str, int]], reason: str
) -> None:
    with inserted_plan(small_vit(), methods, choices) as inserted:
        found: Inserted = inserted
        assert reason in PeftExport().supports(found)


def test_an_untrained_start_is_lora_alone() -> None:
    with inserted_plan(small_vit(), {"it": HfPeft("lokr")}, [(FC1[0], "it", 2)]) as inserted:
        assert "LoRA alone" in PeftInitExport().supports(inserted)
