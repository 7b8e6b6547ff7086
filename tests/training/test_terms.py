from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.errors import Preempted, UsageError
from autopeft.regularisers.dr_tune import DRTune
from autopeft.testing.regulariser_laws import METHODS, RegulariserLaws, borrowed
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Terms
from autopeft.training.checkpoint import Checkpoint
from autopeft.training.loop import fit
from autopeft.training.preempt import preemptible
from autopeft.training.settings import TrainSettings

Insert = Callable[..., Any]


class Recorder:
    """A term that notes what it is shown, and follows a running mean of the loss that it keeps."""

    def __init__(self, weight: float, seed: int) -> None:
        self.weight = weight
        self.seed = seed
        self.seen: list[Any] = []
        self.mean = torch.zeros(())
        self.loaded: dict[str, Tensor] = {}

    def add(self, state: Any) -> Tensor | None:
        self.seen.append((state.step, state.total, state.loss, state.logits, state.features))
        if not self.weight:
            return None
        self.mean = 0.5 * self.mean + 0.5 * state.loss.detach()
        return self.weight * self.mean * state.logits.square().mean()

    def adjust(self, state: Any) -> None:
        self.seen.append(("adjust", state.step))
        for parameter in state.inserted.groups()["lora"]:
            if self.weight and parameter.grad is not None:
                parameter.grad.mul_(1 + self.mean)

    def state(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.loaded = dict(state)
        self.mean = state["mean"]


@dataclass
class Recording:
    """Keeps the terms it has begun."""

    weight: float = 0.1

    def __post_init__(self) -> None:
        self.terms: list[Recorder] = []

    def begin(self, inserted: Any, task: Any, seed: int) -> Recorder:
        self.terms.append(Recorder(self.weight, seed))
        return self.terms[-1]


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _batch() -> Any:
    return next(iter(ToyTask().batches("inner", 1)))


# What a term is shown


def test_loss_logits_and_features_of_the_pass_that_the_loss_is_of(insert: Insert) -> None:
    inserted, task, batch, recording = insert(), ToyTask(), _batch(), Recording()
    terms = Terms(inserted, task, {"r": recording}, seed=4)
    with terms.watching(batch, 3, 24):
        loss = task.loss(inserted.model, batch)
        inserted.model(batch[0] * 2)  # a second pass is not the loss's
    total = terms.added_to(loss)
    ((step, steps, seen_loss, logits, features),) = recording.terms[0].seen
    assert (step, steps) == (3, 24)
    assert seen_loss is loss
    expected = inserted.model(batch[0])
    assert torch.equal(logits, expected)
    assert torch.equal(inserted.model.head(features), expected)
    assert total.item() == pytest.approx((loss + 0.1 * 0.5 * loss * expected.square().mean()).item())
    terms.adjust()
    assert recording.terms[0].seen[-1] == ("adjust", 3)
    terms.adjust()  # the step is forgotten
    assert len(recording.terms[0].seen) == 2


def test_hooks_are_removed_also_after_an_error(insert: Insert) -> None:
    inserted, batch = insert(), _batch()
    terms = Terms(inserted, ToyTask(), {"r": Recording()}, 0)
    with terms.watching(batch, 0, 1):
        assert _hooks(inserted.model) == 2
    assert _hooks(inserted.model) == 0
    with pytest.raises(ZeroDivisionError), terms.watching(batch, 0, 1):
        raise ZeroDivisionError
    assert _hooks(inserted.model) == 0


def test_without_regularisers_there_are_no_hooks(insert: Insert) -> None:
    inserted = insert()
    terms = Terms(inserted, ToyTask(), {}, 0)
    with terms.watching(_batch(), 0, 1):
        assert _hooks(inserted.model) == 0
    loss = torch.tensor(2.0)
    assert terms.added_to(loss) is loss
    terms.adjust()
    assert terms.state() == {}


def test_what_the_model_did_not_do_cannot_be_seen(insert: Insert) -> None:
    terms = Terms(insert(), ToyTask(), {"r": Recording()}, 0)
    with terms.watching(_batch(), 0, 1):
        pass
    with pytest.raises(UsageError, match=r"asks for the logits of this step, and ToyTask\.loss has not run the model"):
        terms.added_to(torch.zeros(()))


def test_adapters_own_terms_are_added_with_and_without_regularisers(insert: Insert) -> None:
    inserted, batch = insert(), _batch()
    inserted.penalty = lambda: torch.tensor(7.0)
    for regularisers in ({}, {"r": Recording(weight=0.0)}):
        terms = Terms(inserted, ToyTask(), regularisers, 0)
        with terms.watching(batch, 0, 1):
            loss = ToyTask().loss(inserted.model, batch)
        assert terms.added_to(loss).item() == pytest.approx(loss.item() + 7)


# Seeds and states


def test_every_regulariser_has_a_seed_of_its_own(insert: Insert) -> None:
    one, other = Recording(), Recording()
    Terms(insert(), ToyTask(), {"one": one, "other": other}, seed=1)
    Terms(insert(), ToyTask(), {"one": one}, seed=1)
    Terms(insert(), ToyTask(), {"one": one}, seed=2)
    seeds = [term.seed for term in one.terms]
    assert seeds[0] == seeds[1] != seeds[2]
    assert other.terms[0].seed != seeds[0]


def test_each_takes_up_its_own_state(insert: Insert) -> None:
    first, second = Recording(), Recording()
    terms = Terms(insert(), ToyTask(), {"a": first, "ab": second}, 0)
    first.terms[0].mean, second.terms[0].mean = torch.tensor(1.0), torch.tensor(2.0)
    assert terms.state() == {"a/mean": torch.tensor(1.0), "ab/mean": torch.tensor(2.0)}
    other = Terms(insert(), ToyTask(), {"ab": second, "a": first}, 0)
    other.load_state(terms.state())
    assert first.terms[1].loaded == {"mean": torch.tensor(1.0)}
    assert second.terms[1].loaded == {"mean": torch.tensor(2.0)}


# In a training

SETTINGS = TrainSettings(epochs=3)


def _fit(inserted: Any, methods: Mapping[str, Any], task: Any = None, **kw: Any) -> None:
    fit(inserted, task or ToyTask(), SETTINGS, methods=methods, seed=3, device="cpu", watch=None, **kw)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_term_is_asked_once_in_every_step_and_its_gradients_are_used(insert: Insert, methods: dict[str, Any]) -> None:
    plain, zero, shaped = (insert(dropout=0.3) for _ in range(3))
    recording = Recording()
    _fit(plain, methods)
    _fit(zero, methods, regularisers={"r": Recording(weight=0.0)})
    _fit(shaped, methods, regularisers={"r": recording})
    assert _same(plain.state(), zero.state())
    assert not _same(plain.state(), shaped.state())
    (term,) = recording.terms
    assert [entry[0] for entry in term.seen if entry[0] != "adjust"] == list(range(12))
    assert [entry[1] for entry in term.seen if entry[0] == "adjust"] == list(range(12))
    assert _hooks(shaped.model) == 0


class Interrupted(ToyTask):
    """Sends a signal to itself in one step; teachers' passes, which are in evaluation mode, are not counted."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        self.at -= torch.is_grad_enabled()
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(model, batch)


@pytest.mark.parametrize("at", [1, 6])
def test_a_stateful_term_survives_a_stop_within_an_epoch(
    insert: Insert, methods: dict[str, Any], tmp_path: Path, at: int
) -> None:
    whole, parts, fresh, forgetful = (insert(dropout=0.3) for _ in range(4))
    recording = Recording()
    _fit(whole, methods, regularisers={"r": recording})
    with preemptible(), pytest.raises(Preempted):
        _fit(parts, methods, Interrupted(at), checkpoint=Checkpoint(tmp_path), regularisers={"r": recording})
    saved = Checkpoint(tmp_path).path.read_bytes()
    _fit(fresh, methods, checkpoint=Checkpoint(tmp_path), regularisers={"r": recording})
    assert recording.terms[-1].loaded
    assert _same(whole.state(), fresh.state())
    # It matters: without what it kept the weights would be others.
    Checkpoint(tmp_path).path.write_bytes(saved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "load_state", lambda self, state: None)
        _fit(forgetful, methods, checkpoint=Checkpoint(tmp_path), regularisers={"r": recording})
    assert not _same(whole.state(), forgetful.state())


def test_dr_tunes_bank_survives_a_stop_within_an_epoch(tmp_path: Path) -> None:
    states = {}
    regularisers = {"dr_tune": DRTune(bank=20, rotate_every=3)}
    for name in ("whole", "parts", "fresh"):
        checkpoint = None if name == "whole" else Checkpoint(tmp_path)
        with borrowed(RegulariserLaws.choices) as inserted:
            task = Interrupted(6) if name == "parts" else ToyTask()
            if name == "parts":
                with preemptible(), pytest.raises(Preempted):
                    _fit(inserted, METHODS, task, checkpoint=checkpoint, regularisers=regularisers)
            else:
                _fit(inserted, METHODS, task, checkpoint=checkpoint, regularisers=regularisers)
            states[name] = inserted.state()
    assert _same(states["whole"], states["fresh"])
    assert not _same(states["whole"], states["parts"])
