from __future__ import annotations

import torch

from autopeft.models.scan import scan
from autopeft.scoring.aligned import agreed_directions, aligned_bases
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask


def test_hand_worked() -> None:
    """Rows on which the halves agree come first, although the third row is larger in both: there they disagree."""
    a = torch.diag(torch.tensor([2.0, 1.0, 5.0]))
    c = torch.diag(torch.tensor([2.0, 1.0, -5.0]))
    left, right = agreed_directions(a, c, 2)
    torch.testing.assert_close(left, torch.eye(3)[:, :2])
    torch.testing.assert_close(right, torch.eye(3)[:, :2])


def test_equal_halves_give_the_singular_vectors() -> None:
    gradient = torch.randn(9, 6, dtype=torch.float64)
    left, right = agreed_directions(gradient.view(9, 3, 2, 1), gradient.view(9, 3, 2, 1), 4)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close((left.double().T @ u[:, :4]).abs(), torch.eye(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close((right.double().T @ vh[:4].T).abs(), torch.eye(4).double(), atol=1e-5, rtol=0)


def test_signal_is_found_under_noise() -> None:
    """One direction in both halves, stronger noise on another in each: the singular vectors of the mean take noise."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.zeros(40, 1), torch.zeros(30, 1)
    u[3], v[5] = 1, 1
    noise_a, noise_c = torch.zeros(40, 30), torch.zeros(40, 30)
    noise_a[7, 8], noise_c[9, 10] = 2.5, 2.5
    small = 0.01 * torch.randn(40, 30, generator=generator)
    a, c = u @ v.T + noise_a + small, u @ v.T + noise_c - small
    left, right = agreed_directions(a, c, 1)
    assert float(left[3].abs()) > 0.99
    assert float(right[5].abs()) > 0.99
    mean = torch.linalg.svd((a + c) / 2)[0][:, 0]
    assert float(mean[3].abs()) < 0.9


def test_of_a_model() -> None:
    model, task = tiny_vit(), ToyTask()
    catalog = scan(model)
    settings = Gradient(batch_size=4)
    found, samples = aligned_bases(model, catalog, task, settings, 0, 3)
    assert samples == task.sizes["inner"]
    assert set(found) == {s.name for s in catalog if s.is_matrix and "weight" in s.slots}
    scores = Gradient(batch_size=4, halves=True, blocks=False).score(model, catalog, task, 0)
    known = scores.evidence["blocks.0.mlp.fc1"]["weight"]
    oracle = agreed_directions(known.half_a, known.half_c, 3)
    torch.testing.assert_close(found["blocks.0.mlp.fc1"], oracle)
