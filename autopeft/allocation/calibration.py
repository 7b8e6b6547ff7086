"""What predicted energies are worth, from measured gains: constants of families, the exponent, the tilt over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopeft.allocation.gain import GainPolicy
from autopeft.errors import UsageError

__all__ = ["Fitted", "MeasuredGain", "fit_calibration", "held_out"]


@dataclass(frozen=True, slots=True)
class MeasuredGain:
    """One option that was trained alone.

    Attributes:
        family: family of its method.
        energy: share of the model's energy that the scorer predicted for it (`Energies.values`); positive.
        drop: measured decrease of the validation loss, in nats; may be negative.
        cell: what else it depends on: the model and the task.
        depth: of its site, from -1 (first block) to 1.
    """

    family: str
    energy: float
    drop: float
    cell: tuple[str, str] = ("", "")
    depth: float = 0.0


@dataclass(frozen=True, slots=True)
class Fitted:
    """`log drop = level + alpha[family] + beta log energy + tilt depth + shift[cell]`.

    Attributes:
        alpha: per family, relative to the mean of the families.
        beta: the exponent.
        level: what is left: the log drop of a mean family in a mean cell at energy 1.
        shift: per cell.
        noise: standard deviation of what is not explained, in nats of log drop.
        tilt: of the depth; negative values favour the first blocks.
    """

    alpha: Mapping[str, float]
    beta: float
    level: float
    shift: Mapping[tuple[str, str], float]
    noise: float
    tilt: float = 0.0

    def predict(self, family: str, energy: float, cell: tuple[str, str] | None = None, depth: float = 0.0) -> float:
        """The expected log drop; families and cells that were not fitted count as the mean one."""
        shift = self.shift.get(cell, 0.0) if cell is not None else 0.0
        return self.level + self.alpha.get(family, 0.0) + self.beta * math.log(energy) + self.tilt * depth + shift

    def calibration(self, reference: str = "core") -> dict[str, float]:
        """Multipliers per family for `GainPolicy.calibration`, 1 for the reference.

        Raises:
            UsageError: when the reference family was not fitted.
        """
        if reference not in self.alpha:
            raise UsageError(f"nothing of family {reference!r} was measured; fitted are {', '.join(self.alpha)}")
        return {family: math.exp(a - self.alpha[reference]) for family, a in self.alpha.items()}

    def policy(self, reference: str = "core") -> GainPolicy:
        """A policy with these constants.

        Raises:
            UsageError: as `calibration` does.
        """
        return GainPolicy(exponent=self.beta, calibration=self.calibration(reference), depth_tilt=self.tilt)


def fit_calibration(
    measured: Sequence[MeasuredGain], *, shrinkage: float = 4.0, beta: float = 0.5, floor: float | None = None
) -> Fitted:
    """Fit a constant per family, one exponent, one tilt and one shift per cell to log drops, all of them shrunk.

    Penalised least squares: families and cells are drawn towards their mean, the exponent towards `beta` and the tilt
    towards 0, as by `shrinkage` further options that sit there (the posterior mean of a normal prior of that many
    observations' precision). Drops at or below `floor` count as the floor: what training could not show has no
    logarithm.

    Args:
        measured: at least two options of some family and cell, with positive energies.
        shrinkage: weight of the priors, in options; 0 fits plainly as far as the data decide.
        beta: prior mean of the exponent; the fitted one is kept in [0.05, 1].
        floor: smallest drop that is told from none, in nats; a tenth of the median positive drop when None.

    Raises:
        UsageError: when nothing was measured, no drop is positive, or a value is out of range.
    """
    if not measured:
        raise UsageError("there is nothing to fit a calibration to; measure some options first")
    if not (math.isfinite(shrinkage) and shrinkage >= 0):
        raise UsageError(f"the shrinkage of a calibration must be at least 0, got {shrinkage}")
    for m in measured:
        if not (math.isfinite(m.energy) and m.energy > 0 and math.isfinite(m.drop)):
            raise UsageError(f"a measured option needs a positive energy and a finite drop, got {m.energy}, {m.drop}")
    positive = [m.drop for m in measured if m.drop > 0]
    if not positive:
        raise UsageError("no measured option lowered the loss, so there is nothing to compare families by")
    least = floor if floor is not None else float(np.median(positive)) / 10
    if not least > 0:
        raise UsageError(f"the floor of measured drops must be above 0, got {floor}")
    families = sorted({m.family for m in measured})
    cells = sorted({m.cell for m in measured})
    y = np.log([max(m.drop, least) for m in measured])
    x = np.log([m.energy for m in measured])
    z = np.array([m.depth for m in measured])
    # Columns: level, slope, tilt, families, cells. The log energies are centred so that the prior leaves the level.
    middle = float(x.mean())
    first = 3
    design = np.zeros((len(y), first + len(families) + len(cells)))
    design[:, 0], design[:, 1], design[:, 2] = 1, x - middle, z
    for i, m in enumerate(measured):
        design[i, first + families.index(m.family)] = 1
        design[i, first + len(families) + cells.index(m.cell)] = 1
    # One option at the spread of the energies weighs so much; a trace of a penalty decides what the data leave open.
    trace = 1e-9
    penalty = np.full(design.shape[1], shrinkage + trace)
    penalty[0] = 0
    penalty[1] = (shrinkage + trace) * max(float(x.var()), trace)
    penalty[2] = shrinkage * float(z.var()) + trace
    target = y - beta * design[:, 1]
    solved = np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ target)
    slope = float(np.clip(beta + solved[1], 0.05, 1.0))
    if slope != beta + solved[1]:
        rest = [0, *range(2, design.shape[1])]
        kept = design[:, rest]
        part = np.linalg.solve(kept.T @ kept + np.diag(penalty[rest]), kept.T @ (y - slope * design[:, 1]))
        solved[rest] = part
    alpha, shift = solved[first : first + len(families)], solved[first + len(families) :]
    level = float(solved[0] + alpha.mean() + shift.mean() - slope * middle)
    fitted = design[:, [0]] @ solved[[0]] + slope * design[:, 1] + design[:, 2:] @ solved[2:]
    return Fitted(
        dict(zip(families, (alpha - alpha.mean()).tolist(), strict=True)),
        slope,
        level,
        dict(zip(cells, (shift - shift.mean()).tolist(), strict=True)),
        float(np.sqrt(np.mean((y - fitted) ** 2))),
        float(solved[2]),
    )


def held_out(
    measured: Sequence[MeasuredGain], axis: int, *, shrinkage: float = 4.0, floor: float | None = None
) -> dict[str, float]:
    """Rank correlation of predicted and measured drops on a model, or a task, that was left out of the fit.

    Args:
        measured: options of at least two models or tasks.
        axis: 0 leaves models out, 1 tasks.
        shrinkage: as in `fit_calibration`.
        floor: as in `fit_calibration`.

    Returns:
        Name of what was left out to Spearman's correlation there, within cells and averaged over them by their options:
        the shift of a cell that was not seen is unknown. Cells with fewer than three options do not count.

    Raises:
        UsageError: as `fit_calibration` does, and with fewer than two names on the axis.
    """
    names = sorted({m.cell[axis] for m in measured})
    if len(names) < 2:
        raise UsageError(f"leaving one out needs at least two {'tasks' if axis else 'models'}, got {', '.join(names)}")
    found: dict[str, float] = {}
    for name in names:
        fitted = None
        total, weight = 0.0, 0
        for cell in sorted({m.cell for m in measured if m.cell[axis] == name}):
            out = [m for m in measured if m.cell == cell]
            if len(out) < 3:
                continue
            rest = [m for m in measured if m.cell[axis] != name]
            fitted = fitted or fit_calibration(rest, shrinkage=shrinkage, floor=floor)
            predicted = [fitted.predict(m.family, m.energy, depth=m.depth) for m in out]
            total += len(out) * _spearman(predicted, [m.drop for m in out])
            weight += len(out)
        if weight:
            found[name] = total / weight
    return found


def _spearman(one: Sequence[float], two: Sequence[float]) -> float:
    from scipy.stats import rankdata

    a, b = rankdata(one), rankdata(two)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
