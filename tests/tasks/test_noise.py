"""Noise schedules, targets and weights, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from autopeft.errors import UsageError
from autopeft.tasks._noise import Prediction, Schedule, fixed_draws

HAND = {"trained_betas": [0.5, 0.6, 0.75], "num_train_timesteps": 3}
"""alphas 0.5, 0.4, 0.25; their products a = 0.5, 0.2, 0.05; snr = a / (1 - a) = 1, 1/4, 1/19."""

T = torch.tensor([0, 1, 2])


def test_noisy_images_by_hand() -> None:
    schedule = Schedule(HAND)
    assert schedule.alphas.tolist() == pytest.approx([0.5, 0.2, 0.05])
    images, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    wanted = [2 * math.sqrt(a) - math.sqrt(1 - a) for a in (0.5, 0.2, 0.05)]
    assert schedule.noisy(images, noise, T).flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_targets_by_hand() -> None:
    images, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    assert torch.equal(Schedule(HAND).target(images, noise, T), noise)
    velocity = Schedule(HAND, "v_prediction")
    wanted = [-math.sqrt(a) - 2 * math.sqrt(1 - a) for a in (0.5, 0.2, 0.05)]
    assert velocity.target(images, noise, T).flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_noise_of_a_velocity_is_found_again() -> None:
    """noise = sqrt(a) v + sqrt(1 - a) x_t, so a difference of velocities times `noise_scale` is one of noises."""
    schedule = Schedule(HAND, "v_prediction")
    images, noise, other = torch.randn(3, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x = schedule.noisy(images, noise, T)
    v, scale = schedule.target(images, noise, T), schedule.noise_scale(T, images)
    torch.testing.assert_close(scale * v + (1 - scale.square()).sqrt() * x, noise)
    torch.testing.assert_close(Schedule(HAND).noise_scale(T, images), torch.ones(3, 1, 1, 1))
    assert not torch.equal(other, noise)


def test_noise_agrees_with_diffusers() -> None:
    from diffusers import DDPMScheduler

    schedule, theirs = (
        Schedule({"beta_schedule": "squaredcos_cap_v2"}),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    images, noise = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(schedule.noisy(images, noise, steps), theirs.add_noise(images, noise, steps))
    velocity = Schedule({"beta_schedule": "squaredcos_cap_v2"}, "v_prediction")
    torch.testing.assert_close(velocity.target(images, noise, steps), theirs.get_velocity(images, noise, steps))


@pytest.mark.parametrize(
    ("prediction", "gamma", "wanted"),
    [
        # min(snr, 5) / snr is 1 wherever snr is below 5, as here.
        ("epsilon", 5.0, [1, 1, 1]),
        # snr 1, 1/4, 1/19 against 0.2: 0.2 / 1, 0.2 / 0.25, 1.
        ("epsilon", 0.2, [0.2, 0.8, 1.0]),
        # min(snr, 5) / (snr + 1) = a: 1/2, 1/5, 1/20.
        ("v_prediction", 5.0, [0.5, 0.2, 0.05]),
        # 0.2 / 2, 0.2 / 1.25, (1/19) / (20/19).
        ("v_prediction", 0.2, [0.1, 0.16, 0.05]),
        ("epsilon", 0.0, [1, 1, 1]),
        ("v_prediction", 0.0, [1, 1, 1]),
    ],
)
def test_min_snr_weights_by_hand(prediction: Prediction, gamma: float, wanted: list[float]) -> None:
    """Hang et al., arXiv 2303.09556."""
    assert Schedule(HAND, prediction).weights(T, gamma).tolist() == pytest.approx(wanted, abs=1e-6)


def test_weights_are_finite_at_both_ends_of_a_schedule() -> None:
    zero_snr = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}
    for prediction in ("epsilon", "v_prediction"):
        weights = Schedule(zero_snr, prediction).weights(torch.arange(1000), 5.0)
        assert bool(torch.isfinite(weights).all())
        assert float(weights.min()) >= 0


def test_fixed_draws_depend_on_name_and_draw_alone() -> None:
    noise, steps = fixed_draws(["a", "b", "c"], (1, 2, 2), 100)
    again, same = fixed_draws(["c", "a"], (1, 2, 2), 100)
    assert torch.equal(again, noise[[2, 0]])
    assert torch.equal(same, steps[[2, 0]])
    other, _ = fixed_draws(["a"], (1, 2, 2), 100, draw=1, draws=2)
    assert not torch.equal(other[0], noise[0])


def test_draws_are_stratified() -> None:
    names = [f"image {i}" for i in range(50)]
    for draw in range(4):
        _, steps = fixed_draws(names, (1, 1, 1), 1000, draw, 4)
        assert int(steps.min()) >= 250 * draw
        assert int(steps.max()) < 250 * (draw + 1)
        assert len(set(steps.tolist())) > 30


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="epsilon, v_prediction"):
        Schedule({"prediction_type": "sample"})
    with pytest.raises(UsageError, match="from 1 to 3 steps"):
        Schedule(HAND).sampler(4)
