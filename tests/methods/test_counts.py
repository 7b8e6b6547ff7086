"""Prices on a ViT-B/16, against the published counts."""

from __future__ import annotations

import pytest
import timm
import torch

from autopeft.core.contracts import Method
from autopeft.core.site import Catalog
from autopeft.methods.bias import Bias
from autopeft.methods.bottleneck import BottleneckAdapter
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF
from autopeft.methods.tokens import Tokens
from autopeft.methods.vector import Vector
from autopeft.models.scan import scan


@pytest.fixture(scope="module")
def vit() -> Catalog:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    return scan(model)


def total(catalog: Catalog, method: Method, size: int, *, fused: str = "whole", kinds: tuple[str, ...] = ()) -> int:
    sites = [s for s in catalog.candidates(fused) if method.slots(s) and (not kinds or s.kind in kinds)]
    return sum(method.cost(site, size).trainable for site in sites)


def test_lora_rank_1_on_all_48_linears(vit: Catalog) -> None:
    assert total(vit, LoRA(), 1, kinds=("linear",)) == 147_456


def test_lora_rank_8_on_six_matrices_per_block(vit: Catalog) -> None:
    assert total(vit, LoRA(), 8, fused="slices", kinds=("linear",)) == 1_327_104


def test_core_7_on_all_72_matrices(vit: Catalog) -> None:
    assert total(vit, Core(), 7, fused="slices", kinds=("linear",)) == 72 * 49


def test_ssf_everywhere(vit: Catalog) -> None:
    assert total(vit, SSF(), 1) == 205_824


def test_norms(vit: Catalog) -> None:
    assert total(vit, Norm(), 1) == 38_400
    assert total(vit, Vector(), 1) == 19_200


def test_all_biases(vit: Catalog) -> None:
    assert total(vit, Bias(), 1) == 102_912


def test_tokens(vit: Catalog) -> None:
    assert total(vit, Tokens(), 1) == 768 + 197 * 768


@pytest.mark.parametrize(("name", "cost"), [("attn.proj", 13_064), ("mlp.fc2", 13_064), ("mlp.fc1", 52_232)])
def test_adapter_of_width_8(vit: Catalog, name: str, cost: int) -> None:
    assert BottleneckAdapter().cost(vit[f"blocks.0.{name}"], 8).trainable == cost


def test_sparse_stores_a_position_beside_each_value(vit: Catalog) -> None:
    cost = Sparse().cost(vit["blocks.0.mlp.fc1"], 100)
    assert (cost.trainable, cost.stored, cost.bits, cost.entries, cost.tensors) == (100, 200, 6_400, 100, 2)


def test_largest_lora_is_smaller_than_the_matrix(vit: Catalog) -> None:
    site = vit["blocks.0.attn.proj"]
    largest = LoRA().sizes(site)[-1]
    assert largest == 256
    assert LoRA().cost(site, largest).trainable < site.n_weight <= LoRA().cost(site, largest - 1).trainable * 2.1
