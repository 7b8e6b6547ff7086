from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.core.site import Catalog, Place, Site
from autopeft.errors import DataError, UsageError
from autopeft.methods.lora import LoRA
from autopeft.models.scan import scan
from autopeft.scoring._out_of_fold import fit_out_of_fold
from autopeft.scoring.calibrated import Calibrated
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.memorising import memorising
from autopeft.scoring.ridge import Ridge
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask

FILE = Gradient(batch_size=2, order="file")


def test_hand_worked(line: Any) -> None:
    """Batches' gradients (2,0) and (0,2): g = (1,1), F = 2 * (2,2) = (4,4). One tensor has no family, so tau = 1/4.

    E = tau * 8 = 2 = |g|^2: nothing is stretched. Damping 1/4 of a mean of 4 is 1. Power 1: signal = 1 / sqrt(5).
    """
    scorer = Calibrated(FILE, power=1.0, damping=0.25, preconditioner="diagonal", folds=0)
    found = scorer.score(*line).evidence["0"]["weight"]
    torch.testing.assert_close(found.signal, torch.full((1, 2), 5**-0.5, dtype=torch.float64))
    torch.testing.assert_close(found.score, torch.full((1, 2), 0.2, dtype=torch.float64))
    torch.testing.assert_close(found.half_a, torch.tensor([[2 * 5**-0.5, 0]], dtype=torch.float64))
    torch.testing.assert_close(found.half_c, torch.tensor([[0, 2 * 5**-0.5]], dtype=torch.float64))
    assert found.square is not None
    assert found.square.tolist() == [[2, 2]]


def test_hand_worked_finite_step(line: Any) -> None:
    """As above with reach 0.1 below |g| / (F + 1) = 0.2: gain = 0.1 - 4 * 0.01 / 2 = 0.08 per entry.

    With reach 1 the step is 0.2: gain = 0.2 - 4 * 0.04 / 2 = 0.12.
    """
    for reach, gain in ((0.1, 0.08), (1.0, 0.12)):
        scorer = Calibrated(FILE, damping=0.25, preconditioner="diagonal", folds=0, reach=reach)
        found = scorer.score(*line).evidence["0"]["weight"]
        torch.testing.assert_close(found.signal.square(), torch.full((1, 2), gain, dtype=torch.float64))
        torch.testing.assert_close(found.score, torch.full((1, 2), gain, dtype=torch.float64))


class Pulls:
    """The loss is linear in the outputs: each sample pulls at its own."""

    classes, data_hash = ("a",), "quadratic"

    def __init__(self, images: torch.Tensor, pulls: torch.Tensor) -> None:
        self.images, self.pulls = images, pulls
        self.sizes = {"inner": len(images), "outer": 0, "test": 0}

    def batches(self, split: str, seed: int | None = None, batch_size: int | None = None) -> Any:
        yield from zip(self.images.split(batch_size or 1), self.pulls.split(batch_size or 1), strict=True)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) * batch[1]).sum(1).mean()


def test_the_gain_is_the_decrease_of_a_quadratic_loss() -> None:
    """Newton steps on `<G, D> + D^T (L (x) R / tr L) D / 2`: low-rank gains are the true optima, rank by rank.

    The optimum of rank r is the r leading singular directions after whitening; the loss there is computed directly, and
    two hundred other changes of that rank are no better.
    """
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    site = Site("0", "0", "linear", (3, 4), False, 0, "other", ("weight",))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    images, labels = normal(24, 4), normal(24, 3)

    scorer = Calibrated(FILE, damping=1e-9, folds=0, reach=1e9, alignment=0.0)
    catalog = Catalog((site,), (), 12, 0, 1)
    found = scorer.score(model, catalog, Pulls(images, labels), 0)  # type: ignore[arg-type]  # what scoring asks of a task
    batches = torch.stack([y.T @ x / 2 for x, y in Pulls(images, labels).batches("inner", batch_size=2)])
    left, right = 2 * (batches @ batches.mT).mean(0), 2 * (batches.mT @ batches).mean(0)
    gradient = batches.mean(0)
    # The energy that one tensor without a family is given: tr F / 24.
    gradient *= (float(left.trace()) / 24 / float(gradient.square().sum())) ** 0.5

    def loss(change: torch.Tensor) -> float:
        bend = (change * (left @ change @ right)).sum() / left.trace()
        return float((gradient * change).sum() + bend / 2)

    def root(matrix: torch.Tensor, power: float) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.pow(power) @ vectors.T

    gains = LoRA().gains(site, found.evidence["0"], (1, 2, 3))
    scale = left.trace() ** 0.5
    u, s, vh = torch.linalg.svd(root(left, -0.5) @ gradient @ root(right, -0.5) * scale, full_matrices=False)
    for rank, gain in enumerate(gains, 1):
        best = -(root(left, -0.5) @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ root(right, -0.5)) * scale
        assert -loss(best) == pytest.approx(gain, rel=1e-4)
        for _ in range(200 if rank < 3 else 0):
            a, b = normal(rank, 4), normal(3, rank)
            direction = b @ a
            slope, bend = (
                float((gradient * direction).sum()),
                2 * (loss(direction) - float((gradient * direction).sum())),
            )
            assert slope**2 / (2 * bend) <= gain


def test_heads_have_not_seen_their_batch() -> None:
    model, task = tiny_vit(), ToyTask(n_inner=24, noise=2.0)
    catalog = scan(model)
    settings = Gradient(batch_size=4, order="file", halves=True)
    heads = fit_out_of_fold(model, catalog, task, settings, 0, 3)
    features: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda m, x: features.append(x[0].detach().double()))
    with torch.no_grad():
        batches = list(task.batches("inner", batch_size=4))
        for images, _ in batches:
            model(images)
    handle.remove()
    before = model.head.weight
    for fold in range(3):
        others = [i for i in range(6) if i % 3 != fold]
        x = torch.cat([features[i] for i in others])
        onehot = torch.eye(4, dtype=torch.float64)[torch.cat([batches[i][1] for i in others])]
        with heads.used(fold + 3):
            found = model.head.weight.detach().double()
        # The penalty is the common one: some penalty, and some temperature, give this very head.
        parts = Ridge(x, onehot)
        errors = []
        for k in range(-40, 25):
            weight, _ = parts.solve(10 ** (k / 8))
            along = float((weight * found).sum() / (weight * weight).sum())
            errors.append(float((along * weight - found).norm() / found.norm()))
        assert min(errors) < 0.05
        whole = Ridge(torch.cat(features), torch.eye(4, dtype=torch.float64)[torch.cat([b[1] for b in batches])])
        weight, _ = whole.solve(10 ** (range(-40, 25)[errors.index(min(errors))] / 8))
        along = float((weight * found).sum() / (weight * weight).sum())
        assert float((along * weight - found).norm() / found.norm()) > 2 * min(errors)
    assert model.head.weight is before


def test_heads_need_a_classifier_and_labels(noise_task: Callable[..., Any]) -> None:
    model, task = tiny_vit(), ToyTask()
    catalog = scan(model)
    with pytest.raises(DataError, match="4 batches are too few for 9 folds"):
        Calibrated(folds=9).score(model, catalog, task)
    with pytest.raises(UsageError, match="need one Linear classifier with a bias, this model has: Conv2d"):
        Calibrated().score(model, Catalog(catalog.sites, ("patch_embed.proj",), 1, 1, 2), ToyTask())
    wide = noise_task(8)
    wide.images = wide.images.float()
    wide.labels = torch.zeros(8, 4)
    wide.criterion = lambda out, y: (out - y).square().sum(1)
    with pytest.raises(UsageError, match="inputs and class labels; set the scorer's folds=0"):
        Calibrated(Gradient(batch_size=2)).score(model, catalog, wide)
    assert Calibrated(Gradient(batch_size=2), folds=0).score(model, catalog, wide).totals


def test_disagreement_shrinks_and_is_listed_but_drops_nothing(plain_task: type) -> None:
    """Two halves that pull one bias apart, and another together: the first keeps half of its energy."""
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]).double()
    images = torch.ones(8, 1, dtype=torch.float64)
    # One step of the first bias helps half of the data by 1 and hurts the other by 0.98.
    pull = torch.tensor([[1.0, 1.0]] * 4 + [[-0.98, 1.0]] * 4, dtype=torch.float64)
    sites = tuple(Site(str(i), str(i), "linear", (1, 1), True, 0, "other", ("bias",)) for i in range(2))
    catalog = Catalog(sites, (), 4, 0, 1)

    class Task(plain_task):  # type: ignore[misc]  # a fixture's value
        def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return torch.cat([model[i](batch[0]) for i in range(2)], 1).mul(batch[1]).sum(1)

    def energies(alignment: float) -> list[float]:
        scorer = Calibrated(FILE, alignment=alignment, preconditioner="diagonal", folds=0)
        scores = scorer.score(model, catalog, Task(images, pull))
        assert list(memorising(scores)) == [Place("0", "bias")]
        assert memorising(scores)[Place("0", "bias")] == pytest.approx(-1)
        assert memorising(scores, below=-1.5) == {}
        return [float(scores.evidence[str(i)]["bias"].signal.square().sum()) for i in range(2)]

    plain, shrunk = energies(0.0), energies(0.5)
    assert shrunk[0] == pytest.approx(plain[0] / 2)
    assert shrunk[1] == pytest.approx(plain[1])
    assert shrunk[0] > 0


def test_scores_without_halves_cannot_be_compared() -> None:
    model = tiny_vit()
    with pytest.raises(UsageError, match="keep no halves to compare; use scorer=calibrated"):
        memorising(Gradient().score(model, scan(model), ToyTask()))


def test_no_gradient_at_all(line: Any) -> None:
    model, catalog, task = line
    task.images.zero_()
    assert Calibrated(FILE, folds=0).score(model, catalog, task).totals == {Place("0", "weight"): 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 1.5}, r"calibrated\.power must lie between 0"),
        ({"damping": 0.0}, r"calibrated\.damping must be positive"),
        ({"reach": -1.0}, r"calibrated\.reach must be positive"),
        ({"folds": 1}, r"calibrated\.folds must be at least 2, or 0"),
        ({"alignment": 1.0}, r"calibrated\.alignment must be at least 0 and below 1"),
        ({"largest_side": 0}, r"calibrated\.largest_side"),
        ({"preconditioner": "full"}, r"calibrated\.preconditioner must be one of diagonal, kronecker"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Calibrated(**settings)


class _Recalled:
    """A task whose memorisation is half the squared outputs for given images."""

    def __init__(self, task: Any, images: torch.Tensor) -> None:
        self._task, self._images = task, images
        self.classes, self.data_hash, self.sizes = task.classes, task.data_hash, task.sizes
        self.batches, self.loss = task.batches, task.loss

    def recall_batches(self, batch_size: int) -> Any:
        return ((part,) for part in self._images.split(batch_size))

    def recall(self, model: nn.Module, batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(batch[0]).square().sum(1).mean() / 2
        return found


def measured(task: Any, images: torch.Tensor) -> Any:
    return _Recalled(task, images)


def test_the_gap_by_hand(line: Any) -> None:
    """As in `test_hand_worked`: the halves' gradients (2,0), (0,2) over sqrt(5); with reach 0.1, roots of their gains.

    Of an entry 2 with F = 4 and lambda = 1: step min(2 / 5, 0.1), gain 2 * 0.1 - 4 * 0.01 / 2 = 0.18.
    """
    for reach, size in ((None, 2 * 5**-0.5), (0.1, 0.18**0.5)):
        scorer = Calibrated(FILE, 1.0, 0.25, "diagonal", reach, folds=0, memory="gap")
        scores = scorer.score(*line)
        memory = scores.evidence["0"]["weight"].memory
        torch.testing.assert_close(memory, torch.tensor([[size, -size]], dtype=torch.float64))
        assert (scores.origin.memory, scores.origin.memory_samples) == ("gap", 0)


@pytest.mark.parametrize("reach", [None, 0.1, 1.0])
def test_a_measure_by_hand(line: Any, reach: float | None) -> None:
    """M = (w x)^2 / 2 at x = (1, 3): its gradient is (w x) x. The step times it is the signal times the memory.

    Steps per entry of g = 1 with F = 4 and lambda = 1: 1 / 5 for power 1, and min(1 / 5, reach) with reach.
    """
    model, catalog, task = line
    x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    scorer = Calibrated(FILE, 1.0, 0.25, "diagonal", reach, folds=0, memory="noise_difference")
    scores = scorer.score(model, catalog, measured(task, x))
    known = scores.evidence["0"]["weight"]
    assert known.memory is not None
    step = 0.2 if reach is None else min(0.2, reach)
    torch.testing.assert_close(known.signal * known.memory, step * float(model[0](x).detach()) * x)
    assert (scores.origin.memory, scores.origin.memory_samples) == ("noise_difference", 2)
    plain = Calibrated(FILE, 1.0, 0.25, "diagonal", reach, folds=0).score(*line).evidence["0"]["weight"]
    assert torch.equal(plain.signal, known.signal)
    assert torch.equal(plain.score, known.score)
    assert plain.memory is None


def test_a_measure_is_seen_in_the_signal_s_coordinates() -> None:
    """Kronecker factors L and R, power 1: `L^(-1/2) dM R^(-1/2) sqrt(tr L)`, the factors computed directly."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    site = Site("0", "0", "linear", (3, 4), False, 0, "other", ("weight",))
    generator = torch.Generator().manual_seed(0)
    images, labels = (torch.randn(24, n, generator=generator, dtype=torch.float64) for n in (4, 3))

    scorer = Calibrated(FILE, power=1.0, damping=1e-9, folds=0, memory="noise_difference")
    task = measured(Pulls(images, labels), images[:5])
    memory = scorer.score(model, Catalog((site,), (), 12, 0, 1), task).evidence["0"]["weight"].memory
    batches = torch.stack([y.T @ x / 2 for x, y in Pulls(images, labels).batches("inner", batch_size=2)])
    left, right = 2 * (batches @ batches.mT).mean(0), 2 * (batches.mT @ batches).mean(0)
    (slope,) = torch.autograd.grad(task.recall(model, (images[:5],)), [model[0].weight])  # type: ignore[list-item]

    def inverse_root(matrix: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors / values.sqrt() @ vectors.T

    wanted = inverse_root(left) @ slope @ inverse_root(right) * left.trace().sqrt()
    torch.testing.assert_close(memory, wanted, rtol=1e-5, atol=1e-9)


def test_what_measures_no_memorisation_is_refused(line: Any) -> None:
    model, catalog, task = line
    scorer = Calibrated(FILE, folds=0, memory="noise_difference")
    with pytest.raises(UsageError, match=r"no measure of memorisation of its own.*memory=gap"):
        scorer.score(model, catalog, task)
    with pytest.raises(UsageError, match=r"no training samples to measure memorisation on.*planted"):
        scorer.score(model, catalog, measured(task, torch.empty(0, 2, dtype=torch.float64)))
    with pytest.raises(UsageError, match=r"memory must be one of noise_difference, gap.*'wen'"):
        Calibrated(memory="wen")  # type: ignore[arg-type]
