from __future__ import annotations

import math

import numpy as np
import pytest

from autopeft.allocation.calibration import MeasuredGain, fit_calibration, held_out
from autopeft.allocation.gain import GainPolicy
from autopeft.errors import UsageError

ALPHA = {"core": 0.0, "matrix": -2.0, "vector": -1.0}
CELLS = [("vit", "digits"), ("vit", "cifar"), ("cnn", "digits"), ("cnn", "cifar")]


def measured(n: int, noise: float, seed: int = 0, beta: float = 0.6, tilt: float = 0.0) -> list[MeasuredGain]:
    """Options whose log drop is `alpha + beta log energy + tilt depth + shift of the cell + noise`."""
    rng = np.random.default_rng(seed)
    shift = dict(zip(CELLS, (0.5, -0.5, 1.0, -1.0), strict=True))
    found = []
    for i in range(n):
        family, cell = list(ALPHA)[i % 3], CELLS[(i // 3) % 4]
        energy = float(np.exp(rng.uniform(-8, -1)))
        depth = (i // 12) % 5 / 2 - 1
        middle = -3 + ALPHA[family] + beta * math.log(energy) + tilt * depth + shift[cell]
        drop = math.exp(middle + noise * rng.standard_normal())
        found.append(MeasuredGain(family, energy, drop, cell, depth))
    return found


def test_exact_data_give_the_constants_back() -> None:
    fitted = fit_calibration(measured(60, 0.0, tilt=-1.5), shrinkage=0.0, floor=1e-12)
    assert fitted.beta == pytest.approx(0.6, abs=1e-4)
    assert fitted.tilt == pytest.approx(-1.5, abs=1e-4)
    assert fitted.noise < 1e-4
    mean = sum(ALPHA.values()) / 3
    assert fitted.alpha == pytest.approx({f: a - mean for f, a in ALPHA.items()}, abs=1e-4)
    assert fitted.level == pytest.approx(-3 + mean, abs=1e-3)
    assert fitted.shift[CELLS[2]] == pytest.approx(1.0, abs=1e-4)
    assert fitted.calibration() == pytest.approx({f: math.exp(a) for f, a in ALPHA.items()}, rel=1e-3)
    assert fitted.predict("core", 0.1, CELLS[2]) == pytest.approx(-3 + 0.6 * math.log(0.1) + 1.0, abs=1e-3)
    policy = fitted.policy()
    assert policy == GainPolicy(exponent=fitted.beta, calibration=fitted.calibration(), depth_tilt=fitted.tilt)
    last = fitted.predict("core", 0.1, CELLS[2], depth=1.0) - fitted.predict("core", 0.1, CELLS[2], depth=-1.0)
    assert last == pytest.approx(-3.0, abs=1e-3)


def test_hand_worked_shrinkage() -> None:
    """Two families at energy 1, one option each, log drops 1 and -1: shrunk by 3 further options to a quarter."""
    options = [MeasuredGain("core", 1.0, math.e), MeasuredGain("matrix", 1.0, 1 / math.e)]
    fitted = fit_calibration(options, shrinkage=3.0, floor=1e-9)
    assert fitted.alpha == pytest.approx({"core": 0.25, "matrix": -0.25}, abs=1e-6)
    assert fitted.beta == pytest.approx(0.5)
    assert fitted.level == pytest.approx(0.0, abs=1e-6)


def test_hand_worked_tilt() -> None:
    """Log drops 1 and -1 at the ends of the depth: least squares give 1, three further options at 0 two fifths."""
    options = [MeasuredGain("core", 1.0, math.e, depth=1.0), MeasuredGain("core", 1.0, 1 / math.e, depth=-1.0)]
    assert fit_calibration(options, shrinkage=0.0, floor=1e-9).tilt == pytest.approx(1.0, abs=1e-6)
    assert fit_calibration(options, shrinkage=3.0, floor=1e-9).tilt == pytest.approx(0.4, abs=1e-6)


def test_few_noisy_options_are_better_shrunk() -> None:
    """Nine options with noise, in 40 draws: the constants' mean square error falls by shrinking."""

    def error(shrinkage: float) -> float:
        total = 0.0
        for seed in range(40):
            fitted = fit_calibration(measured(9, 2.0, seed), shrinkage=shrinkage, floor=1e-12)
            total += sum((fitted.alpha[f] + 1 - a) ** 2 for f, a in ALPHA.items()) + (fitted.beta - 0.6) ** 2
        return total

    assert error(2.0) < error(0.0)


def test_drops_below_the_floor_count_as_the_floor() -> None:
    options = [
        *measured(30, 0.1),
        MeasuredGain("core", 0.01, -1.0, CELLS[0]),
        MeasuredGain("core", 0.01, 0.0, CELLS[0]),
    ]
    low, high = (fit_calibration(options, floor=floor) for floor in (1e-6, 1e-3))
    assert low.predict("core", 0.01, CELLS[0]) < high.predict("core", 0.01, CELLS[0])
    assert math.isfinite(fit_calibration(options).noise)


def test_the_exponent_stays_in_its_range() -> None:
    falling = [MeasuredGain("core", e, d, CELLS[0]) for e, d in ((0.01, 1.0), (0.1, 0.1), (1.0, 0.01))]
    assert fit_calibration(falling, shrinkage=0.0).beta == 0.05
    steep = [MeasuredGain("core", e, e**3, CELLS[0]) for e in (0.01, 0.1, 1.0)]
    fitted = fit_calibration(steep, shrinkage=0.0, floor=1e-9)
    assert fitted.beta == 1.0
    # The level is fitted again at the exponent that is kept.
    assert fitted.predict("core", 0.1) == pytest.approx(3 * math.log(0.1), abs=1e-6)


def test_held_out_models_and_tasks() -> None:
    exact = measured(48, 0.0)
    assert held_out(exact, 0, shrinkage=0.0, floor=1e-12) == pytest.approx({"vit": 1.0, "cnn": 1.0}, abs=1e-6)
    assert set(held_out(exact, 1)) == {"digits", "cifar"}
    assert min(held_out(measured(48, 0.3), 1).values()) > 0.7
    shuffled = [MeasuredGain(m.family, 1 / m.energy, m.drop, m.cell) for m in measured(48, 0.0, beta=0.9)]
    assert max(held_out(shuffled, 0).values()) < 0.9
    with pytest.raises(UsageError, match="at least two models, got vit"):
        held_out([m for m in exact if m.cell[0] == "vit"], 0)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="nothing to fit"):
        fit_calibration([])
    with pytest.raises(UsageError, match="no measured option lowered the loss"):
        fit_calibration([MeasuredGain("core", 0.1, -1.0)])
    with pytest.raises(UsageError, match="positive energy and a finite drop, got 0"):
        fit_calibration([MeasuredGain("core", 0.0, 1.0)])
    with pytest.raises(UsageError, match="shrinkage"):
        fit_calibration(measured(3, 0.0), shrinkage=-1.0)
    with pytest.raises(UsageError, match="floor"):
        fit_calibration(measured(3, 0.0), floor=0.0)
    with pytest.raises(UsageError, match="nothing of family 'tokens' was measured; fitted are core"):
        fit_calibration(measured(3, 0.0)).calibration("tokens")
