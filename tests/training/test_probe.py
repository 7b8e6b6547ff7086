from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn import functional as F

from autopeft.core.site import Catalog
from autopeft.errors import DataError, UsageError
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training._features import features_of, folds_of
from autopeft.training.probe import Probe, lbfgs_probe, ridge_probe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Catalog, ToyTask]:
    model = tiny_convnet()
    return model, scan(model), ToyTask(n_inner=60, n_outer=40, noise=3.0)


def arrays(model: nn.Module, catalog: Catalog, task: Any) -> tuple[Tensor, Tensor]:
    data = features_of(model, catalog, task, CPU, ("inner",))
    return data.x, data.labels


def by_hand(x: Tensor, labels: Tensor, alpha: float, folds: int, seed: int) -> tuple[Tensor, float, float]:
    """Explicit folds with sklearn: held-out predictions, their best temperature on a fine grid, its likelihood."""
    onehot = np.eye(4)[labels.numpy()]
    fold = folds_of(labels, folds, seed)
    held_out = np.empty((len(x), 4))
    for k in range(folds):
        fit = Ridge(alpha=alpha).fit(x[fold != k].numpy(), onehot[(fold != k).numpy()])
        held_out[(fold == k).numpy()] = fit.predict(x[fold == k].numpy())
    logits = torch.from_numpy(held_out)
    grid = np.exp(np.linspace(np.log(1e-2), np.log(10), 2001))
    # The temperature is chosen on targets smoothed by 1 / (n + 2); the likelihood is that of the labels.
    smooth = [float(F.cross_entropy(logits / t, labels, label_smoothing=1 / (len(x) + 2))) for t in grid]
    temperature = float(grid[int(np.argmin(smooth))])
    return logits, temperature, float(F.cross_entropy(logits / temperature, labels))


def test_ridge_equals_sklearn_with_explicit_folds(setting: tuple[nn.Module, Catalog, ToyTask]) -> None:
    model, catalog, task = setting
    x, labels = arrays(model, catalog, task)
    assert x.shape == (60, 16)
    alphas = [1e-4, 1e-2, 1.0]
    probe = ridge_probe(model, catalog, task, device=CPU, folds=4, alphas=alphas, seed=3)
    centred = x - x.mean(0)
    unit = float(torch.linalg.eigvalsh(centred.T @ centred).mean())
    trials = {a * unit: by_hand(x, labels, a * unit, 4, 3) for a in alphas}
    best = min(trials, key=lambda a: trials[a][2])
    logits, temperature, nll = trials[best]
    assert probe.alpha == pytest.approx(best)
    assert probe.temperature == pytest.approx(temperature, rel=4e-3)  # the oracle's grid
    assert probe.cv_nll == pytest.approx(nll, rel=1e-4)  # not at its minimum over the temperature: the grid shows
    assert probe.cv_accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    fit = Ridge(alpha=best).fit(x.numpy(), np.eye(4)[labels.numpy()])
    np.testing.assert_allclose(probe.state["fc.weight"] * probe.temperature, fit.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probe.state["fc.bias"] * probe.temperature, fit.intercept_, rtol=1e-4, atol=1e-5)


def test_fewer_samples_than_features(setting: tuple[nn.Module, Catalog, ToyTask]) -> None:
    """The dual form gives the same solution."""
    model, catalog, _ = setting
    task = ToyTask(n_inner=12)
    x, labels = arrays(model, catalog, task)
    probe = ridge_probe(model, catalog, task, device=CPU, folds=3, alphas=[0.1])
    fit = Ridge(alpha=probe.alpha).fit(x.numpy(), np.eye(4)[labels.numpy()])
    np.testing.assert_allclose(probe.state["fc.weight"] * probe.temperature, fit.coef_, rtol=1e-4, atol=1e-6)


def test_lbfgs_equals_sklearn(setting: tuple[nn.Module, Catalog, ToyTask]) -> None:
    model, catalog, task = setting
    x, labels = arrays(model, catalog, task)
    alphas = [1e-3, 1e-1, 10.0]
    probe = lbfgs_probe(model, catalog, task, device=CPU, folds=3, alphas=alphas, seed=1)
    unit = float(x.var(0, correction=0).mean())
    fold = folds_of(labels, 3, 1).numpy()
    losses, hits = {}, {}
    for a in alphas:
        logs = np.empty((len(x), 4))
        for k in range(3):
            n = int((fold != k).sum())
            fit = LogisticRegression(C=1 / (n * a * unit), tol=1e-8, max_iter=5000)
            logs[fold == k] = fit.fit(x[fold != k].numpy(), labels[fold != k].numpy()).predict_log_proba(x[fold == k])
        losses[a * unit] = -logs[np.arange(len(x)), labels.numpy()].mean()
        hits[a * unit] = float((logs.argmax(1) == labels.numpy()).mean())
    best = min(losses, key=lambda a: losses[a])
    assert probe.alpha == pytest.approx(best)
    assert probe.cv_nll == pytest.approx(losses[best], rel=1e-5)
    assert probe.cv_accuracy == pytest.approx(hits[best])
    assert probe.temperature == 1
    whole = LogisticRegression(C=1 / (len(x) * best), tol=1e-9, max_iter=5000).fit(x.numpy(), labels.numpy())
    np.testing.assert_allclose(probe.state["fc.weight"], whole.coef_, rtol=1e-3, atol=1e-4)
    bias = probe.state["fc.bias"]
    np.testing.assert_allclose(bias - bias.mean(), whole.intercept_ - whole.intercept_.mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fit", [ridge_probe, lbfgs_probe])
def test_the_head_it_gives_works(fit: Any, setting: tuple[nn.Module, Catalog, ToyTask]) -> None:
    """Loaded into the model it beats a random head on other samples, and its likelihood is near the promised one."""
    model, catalog, _ = setting
    task = ToyTask(n_inner=200, n_outer=200, noise=1.0)
    probe: Probe = fit(model, catalog, task, device=CPU)
    random_head = task.evaluate(model, "outer")
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({**kept, **probe.state})
    found = task.evaluate(model, "outer")
    model.load_state_dict(kept)
    assert found["top1"] > random_head["top1"] + 0.2
    assert found["top1"] == pytest.approx(probe.cv_accuracy, abs=0.12)
    assert found["nll"] == pytest.approx(probe.cv_nll, abs=0.25)


def test_repeats_and_leaves_no_trace() -> None:
    model, task = tiny_vit().train(), ToyTask(noise=2.0)
    model.blocks[0].eval()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    catalog = scan(model)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    one, two = (ridge_probe(model, catalog, task, device=CPU, seed=1) for _ in range(2))
    assert all(torch.equal(one.state[k], two.state[k]) for k in ("head.weight", "head.bias"))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not model.head._forward_pre_hooks


def test_more_splits_are_more_samples(setting: tuple[nn.Module, Catalog, ToyTask]) -> None:
    model, catalog, task = setting
    assert len(features_of(model, catalog, task, CPU, ("inner", "outer")).x) == 100
    one = ridge_probe(model, catalog, task, device=CPU)
    both = ridge_probe(model, catalog, task, device=CPU, splits=("inner", "outer"))
    assert not torch.equal(one.state["fc.weight"], both.state["fc.weight"])


def test_convolution_as_head() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3), keepdim=True)).flatten(1)

    model, catalog = Head(), Catalog((), ("fc",), 1, 16, 1)
    probe = ridge_probe(model, catalog, ToyTask(), device=CPU)
    assert probe.state["fc.weight"].shape == (4, 3, 1, 1)
    model.load_state_dict(dict(probe.state))


def test_folds_are_stratified() -> None:
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] * 3)
    fold = folds_of(labels, 5, 0)
    assert fold.bincount().tolist() == [4, 4, 4, 4, 4]
    for c in range(3):
        counts = fold[labels == c].bincount(minlength=5)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(fold, folds_of(labels, 5, 0))
    assert not torch.equal(fold, folds_of(labels, 5, 1))


def test_refusals(setting: tuple[nn.Module, Catalog, ToyTask]) -> None:
    model, catalog, task = setting
    with pytest.raises(UsageError, match="at least 2 folds"):
        ridge_probe(model, catalog, task, device=CPU, folds=1)
    with pytest.raises(UsageError, match="positive and finite"):
        ridge_probe(model, catalog, task, device=CPU, alphas=[0.0])
    with pytest.raises(DataError, match="too few for 61 folds"):
        ridge_probe(model, catalog, task, device=CPU, folds=61)
    with pytest.raises(UsageError, match="one classifier"):
        ridge_probe(model, Catalog((), ("fc", "head"), 1, 0, 1), task, device=CPU)
    with pytest.raises(UsageError, match="'stem' is a Conv2d"):
        ridge_probe(model, Catalog((), ("stem",), 1, 0, 1), task, device=CPU)
    with pytest.raises(UsageError, match="4 outputs and a bias"):
        ridge_probe(model, catalog, ToyTask(n_inner=60, classes=3), device=CPU)
    broken = tiny_convnet()
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(DataError, match="not finite"):
        ridge_probe(broken, catalog, task, device=CPU)
    torch.nn.init.zeros_(broken.norm.weight)
    with pytest.raises(DataError, match="alike for all 60 images"):
        ridge_probe(broken, catalog, task, device=CPU)
