"""Laws of scorers.

Subclass `ScorerLaws` and give `make()`; pytest does the rest. `BROKEN` holds one scorer per law that breaks this law
and no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from autopeft.core.contracts import Scorer
from autopeft.core.outcome import Split
from autopeft.core.scores import Evidence, Scores
from autopeft.core.site import Catalog, Place, Slot
from autopeft.models.scan import scan
from autopeft.testing._broken_scorers import BROKEN
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask

__all__ = ["BROKEN", "ScorerLaws"]

_FIELDS = ("value", "signal", "score", "half_a", "half_c", "square", "memory")
_SEED = 5


class ScorerLaws:
    """Base class of scorers' tests.

    Attributes:
        models: the tiny models to try, `vit` and `convnet`.
        sensitive: whether the scorer looks at the data, so that other data give other scores.
    """

    models: ClassVar[tuple[str, ...]] = ("vit", "convnet")
    sensitive: ClassVar[bool] = True

    def make(self) -> Scorer:
        """The scorer under test."""
        raise NotImplementedError

    def test_leaves_no_trace(self) -> None:
        """Weights, buffers, gradients, flags, modes, hooks and random states are as before."""
        for model, catalog in self._grounds():
            before = _state(model)
            self._score(model, catalog)
            _same(before, _state(model))

    def test_leaves_no_trace_after_an_exception(self) -> None:
        """The same when the task fails in the middle of the pass."""
        for model, catalog in self._grounds():
            before = _state(model)
            with contextlib.suppress(_Interrupted):
                self.make().score(model, catalog, _FailingTask(), _SEED)
            _same(before, _state(model))

    def test_looks_at_the_inner_split_alone(self) -> None:
        """No sample of another split is asked for, by any way."""
        for model, catalog in self._grounds():
            task = _WatchedTask()
            self.make().score(model, catalog, task, _SEED)
            assert task.opened <= {"inner"}, f"the scorer looked at {', '.join(sorted(task.opened - {'inner'}))}"

    def test_repeats(self) -> None:
        """The same seed gives the same scores, whatever the caller's random state."""
        for model, catalog in self._grounds():
            one = self._score(model, catalog)
            torch.rand(3)
            np.random.rand(3)
            random.random()
            _equal(one, self._score(model, catalog), "a second run")

    def test_order_of_sites_does_not_matter(self) -> None:
        """Permuting the sites permutes the scores."""
        for model, catalog in self._grounds():
            turned = dataclasses.replace(catalog, sites=catalog.sites[::-1])
            _equal(self._score(model, catalog), self._score(model, turned), "the reversed catalogue")

    def test_every_tensor_is_answered(self) -> None:
        """Evidence for every tensor of a site that has slots, a total for every place that has a tensor."""
        for model, catalog in self._grounds():
            scores = self._score(model, catalog)
            wanted: set[Place] = set()
            for site in catalog:
                slots: list[Slot] = ["tokens" if site.kind == "tokens" else "weight"]
                if site.kind in ("block", "residual"):
                    slots = []
                elif site.has_bias:
                    slots.append("bias")
                for slot in slots if site.slots else ():
                    found = scores.evidence.get(site.name)
                    assert found is not None, f"nothing is known about {site.name}"
                    assert found.get(slot) is not None, f"nothing is known about {site.name}:{slot}"
                    if slot in site.slots:
                        wanted.add(Place(site.name, slot))
            missing = sorted(str(place) for place in wanted - set(scores.totals))
            assert not missing, f"no total for {', '.join(missing)}"

    def test_evidence_has_the_site_s_shape(self) -> None:
        """Tensors lie on the CPU in the site's shape, and `value` is the pre-trained tensor."""
        for model, catalog in self._grounds():
            for name, evidence in self._score(model, catalog).evidence.items():
                for slot, field, tensor in _tensors(evidence):
                    where = f"{field} of {name}:{slot}"
                    assert tensor.device.type == "cpu", f"{where} lies on {tensor.device}"
                    expected = _shape(evidence, slot, field)
                    assert tuple(tensor.shape) == expected, f"{where} has shape {tuple(tensor.shape)}, not {expected}"
                    if field == "value" and slot != "output":
                        true = _parameter(model, evidence, slot)
                        assert torch.equal(tensor, true), f"{where} is not the pre-trained tensor"

    def test_scores_are_finite_and_not_negative(self) -> None:
        """So are totals, and each is the sum of its entries."""
        for model, catalog in self._grounds():
            scores = self._score(model, catalog)
            for name, evidence in scores.evidence.items():
                for slot, field, tensor in _tensors(evidence):
                    assert bool(torch.isfinite(tensor).all()), f"{field} of {name}:{slot} is not finite"
                    if field in ("score", "square"):
                        assert bool((tensor >= 0).all()), f"{field} of {name}:{slot} is negative somewhere"
            for place, total in scores.totals.items():
                tensor = scores.evidence[place.site][place.slot].score
                own = float(tensor.double().sum())
                assert abs(total - own) <= 1e-5 * own, f"the total of {place} is {total}, its entries sum to {own}"

    def test_slices_are_rows_of_the_whole(self) -> None:
        """Slices of a fused projection share the memory of the whole."""
        for model, catalog in self._grounds():
            scores = self._score(model, catalog)
            for site in catalog:
                for slot, field, tensor in _tensors(scores.evidence[site.name]) if site.rows and site.slots else ():
                    whole = getattr(scores.evidence[site.parent].slots[slot], field)
                    assert site.rows is not None
                    rows = whole[site.rows[0] : site.rows[1]]
                    shared = rows.data_ptr() == tensor.data_ptr() and torch.equal(rows, tensor)
                    assert shared, f"{field} of {site.name}:{slot} is not a view of {site.parent}"

    def test_origin_is_true(self) -> None:
        """The catalogue's fingerprint always; the data's hash where data were looked at."""
        for model, catalog in self._grounds():
            task = _WatchedTask()
            origin = self.make().score(model, catalog, task, _SEED).origin
            assert origin.catalog == catalog.fingerprint, "the origin names another catalogue"
            assert origin.scorer, "the origin does not name the scorer"
            if task.opened:
                assert origin.data == task.data_hash, "the origin names other data"
                assert 0 < origin.n_samples <= task.sizes["inner"], f"{origin.n_samples} samples were not looked at"
            else:
                assert origin.n_samples == 0, f"the origin names {origin.n_samples} samples, none was looked at"

    def test_other_data_give_other_scores(self) -> None:
        """A scorer that looks at data depends on them, one that does not, does not."""
        for model, catalog in self._grounds():
            one = self._score(model, catalog)
            other = self.make().score(model, catalog, ToyTask(seed=9), _SEED)
            same = all(other.totals[place] == total for place, total in one.totals.items())
            assert same != self.sensitive, f"the scores do {'not ' if same else ''}depend on the data"

    def _grounds(self) -> Iterator[tuple[nn.Module, Catalog]]:
        """The tiny models, in a state that no scorer would leave behind by chance."""
        for name in self.models:
            model = _made(name)
            for i, module in enumerate(model.modules()):
                module.training = i % 3 == 0
            for i, p in enumerate(model.parameters()):
                p.requires_grad_(i % 2 == 0)
                if i % 4 == 0:
                    p.grad = torch.full_like(p, 0.5)
            yield model, _catalog(name)

    def _score(self, model: nn.Module, catalog: Catalog) -> Scores:
        return self.make().score(model, catalog, ToyTask(), _SEED)


def _made(name: str) -> nn.Module:
    return tiny_vit() if name == "vit" else tiny_convnet()


@functools.cache
def _catalog(name: str) -> Catalog:
    return scan(_made(name))


class _Interrupted(Exception):
    """What a failing task raises."""


class _WatchedTask(ToyTask):
    """Remembers the splits that were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: set[str] = set()

    def batches(self, split: Split, seed: int | None = None, batch_size: int | None = None) -> Any:
        self.opened.add(split)
        return super().batches(split, seed, batch_size)

    def predict(self, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
        self.opened.add(split)
        return super().predict(model, split)

    def unseal_test(self) -> None:
        self.opened.add("test")
        super().unseal_test()


class _FailingTask(ToyTask):
    """Fails at the third loss."""

    def __init__(self) -> None:
        super().__init__()
        self._left = 2

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        if not self._left:
            raise _Interrupted
        self._left -= 1
        return super().losses(model, batch)


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that a scorer may change for a while and must put back."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    leaf_hooks = [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters()]
    return {
        "weights or buffers": {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()},
        "order of the state dict": list(model.state_dict()),
        "identity of parameters": {name: id(p) for name, p in model.named_parameters()},
        "identity of gradients": [id(p.grad) if p.grad is not None else None for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in hooks] + leaf_hooks,
        "random state of torch": torch.get_rng_state(),
        "random state of numpy": np.random.get_state(),
        "random state of Python": random.getstate(),
    }


def _same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, old in before.items():
        assert _alike(old, after[what]), f"the scorer changed the {what}"


def _alike(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_alike(v, two[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_alike, one, two))
    return bool(one == two)


def _equal(one: Scores, two: Scores, what: str) -> None:
    assert dict(one.totals) == dict(two.totals), f"{what} gives other totals"
    assert one.evidence.keys() == two.evidence.keys(), f"{what} gives evidence for other sites"
    for name, evidence in one.evidence.items():
        for slot, field, tensor in _tensors(evidence):
            assert torch.equal(tensor, getattr(two.evidence[name].slots[slot], field)), (
                f"{what} gives another {field} of {name}:{slot}"
            )


def _tensors(evidence: Evidence) -> Iterator[tuple[Slot, str, Tensor]]:
    for slot, fields in evidence.slots.items():
        for field in _FIELDS:
            tensor = getattr(fields, field)
            if tensor is not None:
                yield slot, field, tensor  # type: ignore[misc]  # the keys of `slots` are slots


def _shape(evidence: Evidence, slot: Slot, field: str) -> tuple[int, ...]:
    shape = evidence.site.shape
    if slot == "output":
        return (0,) if field == "value" else (shape[0], shape[0])
    return shape[:1] if slot == "bias" else shape


def _parameter(model: nn.Module, evidence: Evidence, slot: Slot) -> Tensor:
    site = evidence.site
    parameter = getattr(model.get_submodule(site.module), "bias" if slot == "bias" else site.parameter)
    assert isinstance(parameter, nn.Parameter)
    found = parameter.detach()
    return found if site.rows is None else found[site.rows[0] : site.rows[1]]
