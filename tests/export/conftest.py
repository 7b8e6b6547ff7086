from __future__ import annotations

import pytest

from autopeft.testing._export_ground import ExportGround, small_vit


@pytest.fixture(scope="module", autouse=True)
def _quick(request) -> None:
    """Every export is verified by a process that is warm, but where the fresh process is what is tested."""
    if request.path.name != "test_verify.py":
        request.getfixturevalue("quick_verify")


@pytest.fixture(scope="session")
def ground() -> ExportGround:
    return small_vit()


@pytest.fixture
def low_rank_plan(ground):
    """Every shape of low-rank option: a whole fused projection, two of its slices, a Linear, a convolution."""
    return (
        ground.option("blocks.0.attn.qkv", "core", 3),
        ground.option("blocks.1.attn.qkv[q]", "lora", 2),
        ground.option("blocks.1.attn.qkv[v]", "core", 4),
        ground.option("blocks.1.mlp.fc1", "lora", 1),
        ground.option("patch_embed.proj", "lora", 2),
    )


@pytest.fixture
def mixed_plan(ground):
    """Every mergeable kind beside low rank."""
    return (
        ground.option("blocks.0.attn.qkv", "lora", 2),
        ground.option("blocks.0.attn.proj", "sparse", 5),
        ground.option("blocks.0.norm1", "norm"),
        ground.option("blocks.1.mlp.fc1", "bias"),
        ground.option("blocks.1.mlp.fc2", "ssf"),
    )
