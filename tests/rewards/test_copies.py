from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.rewards import _copies
from autopeft.rewards._copies import amd, extracted, has_clique, memorisation_penalty, tile_distances


def noise(n: int, seed: int = 0, size: int = 8) -> Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_amd_hand_worked() -> None:
    training = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # Cosines 1 and 0.8; distances 2 and |(0.4, 0.8)| to the nearest, per root of two entries.
    generated = torch.tensor([[3.0, 0.0], [0.6, 0.8]])
    assert amd(generated, training) == pytest.approx((0.0 + 0.2) / 2)
    nearest = [2.0, (0.4**2 + 0.8**2) ** 0.5]
    assert amd(generated, training, "l2") == pytest.approx(sum(nearest) / 2 / 2**0.5)
    assert amd(training, training) == pytest.approx(0.0)
    with pytest.raises(UsageError, match="'hamming'"):
        amd(generated, training, "hamming")


def test_penalty_hand_worked() -> None:
    training = torch.tensor([[1.0, 0.0]])
    near = torch.tensor([[-0.96, 0.28]])
    # 1 - |cos| = 0.04: below the threshold of 0.1, so FID is multiplied by 25; above 0.03 it is left alone.
    assert memorisation_penalty(near, training) == pytest.approx(25.0, rel=1e-5)
    assert memorisation_penalty(near, training, 0.03) == 1.0
    assert memorisation_penalty(training, training) == pytest.approx(1e6)
    with pytest.raises(UsageError, match="above 0"):
        memorisation_penalty(near, training, 0.0)


def test_tiles_see_what_the_whole_does_not() -> None:
    x, y = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
    y[0, :, 2:4, 4:6] = 3.0
    # One of 16 tiles differs by 3 everywhere: its root mean square is 3, that of the image 3 / 4.
    assert tile_distances(x, y).item() == pytest.approx(3.0)
    assert tile_distances(x, y, 1).item() == pytest.approx(0.75)


def test_tiles_of_sides_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noise(2, 1, 10), noise(3, 2, 10)
    edges = [0, 2, 5, 8, 10]
    by_hand = torch.zeros(2, 3, dtype=torch.float64)
    for i, j in itertools.product(range(2), range(3)):
        for (a, b), (c, d) in itertools.product(itertools.pairwise(edges), repeat=2):
            tile = (x[i, :, a:b, c:d] - y[j, :, a:b, c:d]).double()
            by_hand[i, j] = max(by_hand[i, j], tile.square().mean().sqrt())
    torch.testing.assert_close(tile_distances(x, y), by_hand)
    monkeypatch.setattr(_copies, "_CELLS", 1)
    torch.testing.assert_close(tile_distances(x, y), by_hand)


def brute_force(alike: Tensor, size: int) -> bool:
    return any(
        all(bool(alike[i, j]) for i, j in itertools.combinations(members, 2))
        for members in itertools.combinations(range(len(alike)), size)
    )


def test_cliques_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for n, p in itertools.product((3, 5, 8), (0.2, 0.5, 0.8)):
        for _ in range(6):
            upper = (torch.rand(n, n, generator=generator) < p).triu(1)
            alike = upper | upper.T
            for size in (1, 2, 3, 4):
                assert has_clique(alike, size) == brute_force(alike, size)
                seen.add((size, brute_force(alike, size)))
    assert {(3, True), (3, False), (4, True), (4, False)} <= seen


def test_a_chain_is_no_clique() -> None:
    # 0 - 1 - 2: a connected component of three, which the released code counts, and no clique of three.
    chain = torch.tensor([[False, True, False], [True, False, True], [False, True, False]])
    assert not has_clique(chain, 3)
    assert has_clique(chain, 2)


def test_extraction_is_exact_on_constructed_sets() -> None:
    training = noise(6, 3)
    copies = [training[i] + 0.01 * noise(k, 10 + i) for i, k in {0: 4, 2: 3, 4: 2}.items()]
    generated = torch.cat([*copies, noise(10, 99)])
    # Rows 0 and 2 are given back at least three times, row 4 twice.
    assert extracted(generated, training, 0.1, 3) == 2
    assert extracted(generated, training, 0.1, 4) == 1
    assert extracted(generated, training, 0.1, 2) == 3
    assert extracted(generated, training, 0.1, 5) == 0
    assert extracted(noise(10, 99), training, 0.1, 1) == 0


def test_copies_of_one_training_image_count_once() -> None:
    training = torch.cat([noise(1, 3).expand(5, -1, -1, -1), noise(2, 4)])
    generated = training[:1] + 0.01 * noise(4, 5)
    assert extracted(generated, training, 0.1, 3) == 1


def test_images_around_a_training_image_that_differ_from_each_other_do_not_count() -> None:
    # Both are within 0.1 of the training image, and 0.18 from each other.
    training = torch.zeros(1, 1, 8, 8)
    generated = torch.stack([torch.full((1, 8, 8), v) for v in (0.09, -0.09)])
    assert extracted(generated, training, 0.1, 2) == 0
    assert extracted(generated, training, 0.2, 2) == 1


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"threshold": 0.1, "clique": 0}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="above 0 and cliques"):
        extracted(noise(2), noise(2), **settings)  # type: ignore[arg-type]


def test_images_of_other_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="of one shape"):
        tile_distances(noise(2), noise(2, size=9))
    with pytest.raises(UsageError, match="at least 4 pixels"):
        tile_distances(noise(2, size=3), noise(2, size=3))
