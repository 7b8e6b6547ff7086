import pytest
import torch

from autopeft.export._low_rank import gather_factors, not_low_rank
from autopeft.export._model import adapters_of, states_of
from autopeft.testing._export_ground import small_vit


def test_factors_are_the_merged_change(ground, low_rank_plan):
    with ground.borrowed(low_rank_plan) as inserted:
        states = states_of(inserted)
        found = gather_factors(inserted, adapters_of(inserted).values())
    assert [(f.module, f.rank) for f in found] == [
        ("patch_embed.proj", 2),
        ("blocks.0.attn.qkv", 3),
        ("blocks.1.attn.qkv", 6),
        ("blocks.1.mlp.fc1", 1),
    ]
    for factors in found:
        name = f"{factors.module}.weight"
        change = states.merged[name] - states.base[name]
        torch.testing.assert_close((factors.up @ factors.down).view(factors.shape), change, atol=2e-6, rtol=1e-5)


def test_slices_fill_their_own_rows(ground, low_rank_plan):
    with ground.borrowed(low_rank_plan) as inserted:
        factors = gather_factors(inserted, adapters_of(inserted).values())[2]
    occupied = factors.up.view(3, 32, 6).abs().sum(1) > 0  # q, k, v by column
    assert occupied.tolist() == [[True, True] + [False] * 4, [False] * 6, [False, False] + [True] * 4]


def test_what_is_not_low_rank_is_named(ground, mixed_plan):
    with ground.borrowed(mixed_plan) as inserted:
        reason = not_low_rank(inserted)
    for option in mixed_plan[1:]:
        assert f"{option.key} (no low-rank change)" in reason
    assert mixed_plan[0].key not in reason


def test_of_many_reasons_the_first_are_told(ground):
    plan = tuple(
        ground.option(f"blocks.{block}.{site}", "bias")
        for block in (0, 1)
        for site in ("attn.qkv", "attn.proj", "mlp.fc1")
    )
    with ground.borrowed(plan) as inserted:
        reason = not_low_rank(inserted)
    assert reason.count("no low-rank change") == 4
    assert reason.endswith(", and 2 more")


@pytest.fixture(scope="module")
def convolutions():
    return small_vit("test_efficientnet", 32)


def test_convolutions_in_groups_are_named(convolutions):
    grouped = next(s for s in convolutions.catalog if s.groups > 1 and s.n_weight > s.in_features + s.out_features)
    plain = next(s for s in convolutions.catalog if s.kind == "conv2d" and s.groups == 1 and s.role != "stem")
    with convolutions.borrowed(
        (convolutions.option(grouped.name, "core", 1), convolutions.option(plain.name, "lora", 1))
    ) as inserted:
        assert not_low_rank(inserted) == f"{grouped.name}/core (a convolution in groups)"
