"""Generated images that are copies of training images."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import torch
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.rewards._distance import nearest

__all__ = ["amd", "extracted", "has_clique", "memorisation_penalty", "tile_distances"]

_CELLS = 1 << 24
"""Differences of pixels that are held at once."""


def amd(generated: Tensor, training: Tensor, metric: str = "cosine") -> float:
    """The mean over generated images of the distance to the nearest training image; lower is nearer to copying.

    Args:
        generated: (n, ...), pixels or features.
        training: (m, ...), the same.
        metric: `cosine` for `1 - cos`, or `l2` divided by the root of the number of entries.
    """
    if metric not in ("cosine", "l2"):
        raise UsageError(f"AMD is measured by cosine or l2, got {metric!r}")
    found, _ = nearest(generated, training, "cosine" if metric == "cosine" else "l2")
    scale = generated[0].numel() ** 0.5 if metric == "l2" else 1.0
    return float(found.mean()) / scale


def memorisation_penalty(generated: Tensor, training: Tensor, threshold: float = 0.1) -> float:
    """What FID is multiplied by to make MiFID: `1 / s` for a mean distance s below the threshold, else 1.

    s is the mean over generated samples of the least `1 - |cos|` to a training sample; Bai et al., 2021, arXiv
    2106.03062, section 3.2. Perfect copies would divide by 0 and are taken at `1e-6`.

    Args:
        generated: features (n, d).
        training: features (m, d).
        threshold: distance from which on nothing counts as memorised, above 0.
    """
    if not threshold > 0:
        raise UsageError(f"the threshold of the memorisation penalty must be above 0, got {threshold}")
    found, _ = nearest(generated, training, "abs_cosine")
    distance = float(found.mean())
    return 1.0 / max(distance, 1e-6) if distance < threshold else 1.0


def tile_distances(x: Tensor, y: Tensor, tiles: int = 4) -> Tensor:
    """The largest over a grid of tiles of the root mean square difference there.

    Carlini et al., 2023, arXiv 2301.13188, section 4.2: two images with one background and different subjects are far
    apart in some tile, where they are near as wholes.

    Args:
        x: images (n, C, H, W).
        y: images (m, C, H, W).
        tiles: tiles along each side; sides that do not divide are split as evenly as whole pixels allow.

    Returns:
        float64 (n, m), in the unit of the pixels.

    Raises:
        UsageError: for images of different shapes, or with fewer pixels than tiles along a side.
    """
    if x.ndim != 4 or y.ndim != 4 or x.shape[1:] != y.shape[1:] or min(x.shape[2:]) < tiles or tiles < 1:
        raise UsageError(
            f"tiles need images (n, C, H, W) of one shape with at least {tiles} pixels a side, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = (t.detach().to(device="cpu", dtype=torch.float64) for t in (x, y))
    rows, columns = (_spans(side, tiles) for side in x.shape[2:])
    found = torch.empty(len(x), len(y), dtype=torch.float64)
    step = max(1, _CELLS // (max(1, len(y)) * x[0].numel()))
    for start in range(0, len(x), step):
        squares = (x[start : start + step, None] - y[None]).square().mean(2)
        worst = [squares[..., a:b, c:d].mean((-2, -1)) for a, b in rows for c, d in columns]
        found[start : start + step] = torch.stack(worst).amax(0).sqrt()
    return found


def extracted(generated: Tensor, training: Tensor, threshold: float, clique: int = 3, tiles: int = 4) -> int:
    """How many different training images the generator gives back.

    A training image counts when at least `clique` generated images are nearer to it than the threshold and, pairwise,
    to each other: a true clique, where connected components would chain images that only resemble neighbours of
    neighbours. Training images that are nearer to each other than a ten-thousandth are copies and count once.

    Args:
        generated: (n, C, H, W).
        training: (m, C, H, W).
        threshold: largest tile distance of a copy, in the unit of the pixels.
        clique: generated images that must agree.
        tiles: as in `tile_distances`.
    """
    if not (threshold > 0 and clique >= 1):
        raise UsageError(f"extraction needs a threshold above 0 and cliques of at least 1, got {threshold}, {clique}")
    near = tile_distances(training, generated, tiles) < threshold
    candidates = [i for i in range(len(training)) if int(near[i].sum()) >= clique]
    if not candidates:
        return 0
    involved = near[candidates].any(dim=0).nonzero()[:, 0]
    alike = tile_distances(generated[involved], generated[involved], tiles) < threshold
    copies = _first_copies(training[candidates], tiles)
    return sum(
        has_clique(alike[members][:, members], clique)
        for i, first in zip(candidates, copies, strict=True)
        if first and len(members := near[i][involved].nonzero()[:, 0])
    )


def has_clique(alike: Tensor, size: int) -> bool:
    """Whether a symmetric boolean matrix (n, n) holds `size` members that are pairwise alike."""
    n = len(alike)
    if n < size:
        return False
    pairs = alike.clone()
    pairs.fill_diagonal_(False)
    if int(pairs.sum()) == n * (n - 1):
        return True
    # Members of a clique of k have k - 1 neighbours that have k - 1 neighbours, and so on.
    graph = nx.from_numpy_array(pairs.numpy())
    core = nx.k_core(graph, size - 1)
    return any(len(found) >= size for found in nx.find_cliques(core))


def _first_copies(images: Tensor, tiles: int) -> list[bool]:
    """Of every image whether no earlier one is its copy."""
    same = tile_distances(images, images, tiles) < 1e-4
    return [not bool(same[i, :i].any()) for i in range(len(images))]


def _spans(side: int, parts: int) -> list[tuple[int, int]]:
    edges = [round(i * side / parts) for i in range(parts + 1)]
    return list(pairwise(edges))
