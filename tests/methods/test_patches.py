from __future__ import annotations

import pytest
import torch

from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._patches import check_prefix, extra_tokens, on_patches, patch_grid

SITE = Site("blocks.0.mlp", "blocks.0.mlp", "residual", (2,), False, 0, "mlp", ("output",))


@pytest.mark.parametrize(
    ("count", "prefix", "grid"),
    [
        (197, None, (1, 14, 0)),
        (196, None, (0, 14, 0)),
        (198, None, (2, 14, 0)),
        (1 + 4 + 37 * 37, None, (5, 37, 0)),
        (5, None, (1, 2, 0)),
        (1, None, (0, 1, 0)),
        (3, 2, (2, 1, 0)),
        (10, 1, (1, 3, 0)),
        (10, 6, (6, 2, 0)),
        (129, None, (8, 11, 0)),  # the longest prefix that is believed
    ],
)
def test_grid(count: int, prefix: int | None, grid: tuple[int, int, int]) -> None:
    assert tuple(patch_grid(SITE, count, prefix)) == grid


def test_known_tokens_behind_are_kept_apart() -> None:
    with extra_tokens(50):
        assert tuple(patch_grid(SITE, 247, None)) == (1, 14, 50)
        with extra_tokens(3):
            assert tuple(patch_grid(SITE, 250, 1)) == (1, 14, 53)
    with pytest.raises(ZeroDivisionError), extra_tokens(9):
        raise ZeroDivisionError
    assert tuple(patch_grid(SITE, 197, None)) == (1, 14, 0)


@pytest.mark.parametrize(
    ("count", "prefix", "message"),
    [
        (130, None, "9 tokens in"),
        (193, None, "24 tokens in"),
        (197, 0, "197 form no square"),
        (3, 3, "0 form no square"),
    ],
)
def test_rectangles_are_refused(count: int, prefix: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        patch_grid(SITE, count, prefix)


def test_patches_lie_in_rows_between_the_other_tokens() -> None:
    x = torch.arange(2 * 7 * 2.0).view(2, 7, 2)  # one class token, 2 x 2 patches, two prompts
    with extra_tokens(2):
        y = on_patches(SITE, x, None, lambda maps: maps.flip(1), lambda rest: -rest)
    order = [0, 3, 4, 1, 2, 5, 6]
    sign = torch.tensor([-1.0, 1, 1, 1, 1, -1, -1])
    assert torch.equal(y, sign[:, None] * x[:, order])
    with extra_tokens(2):
        alone = on_patches(SITE, x, None, lambda maps: maps)
    assert torch.equal(alone, (sign > 0)[:, None] * x)


def test_maps_are_their_own_grid() -> None:
    x = torch.randn(2, 3, 3, 2)
    assert torch.equal(on_patches(SITE, x, 1, lambda maps: 2 * maps), 2 * x)
    with pytest.raises(UsageError, match="4 x 16"):
        on_patches(SITE, torch.randn(2, 4, 16, 2), None, lambda maps: maps)
    with pytest.raises(UsageError, match="a grid of patches needs"):
        on_patches(SITE, torch.randn(2, 2), None, lambda maps: maps)


def test_bad_prefix() -> None:
    check_prefix("m", None)
    check_prefix("m", 0)
    with pytest.raises(UsageError, match=r"m: prefix .* got -1"):
        check_prefix("m", -1)
