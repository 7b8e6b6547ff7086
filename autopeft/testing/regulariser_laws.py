"""Laws of regularisers, as tests to inherit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Inserted, Method, Regulariser
from autopeft.core.menu import Option
from autopeft.core.site import Catalog
from autopeft.errors import Diverged
from autopeft.methods.bias import Bias
from autopeft.methods.lora import LoRA
from autopeft.methods.ssf import SSF
from autopeft.models.scan import scan
from autopeft.testing._broken_regularisers import BROKEN
from autopeft.testing._model_facts import differences, facts
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Terms
from autopeft.training.loop import fit
from autopeft.training.settings import TrainSettings

__all__ = ["BROKEN", "METHODS", "Choices", "RegulariserLaws", "borrowed"]

Choices = tuple[tuple[str, str], ...]
"""What a plan puts where: names of sites, and of methods (`lora`, `bias`, `ssf`)."""

METHODS: Mapping[str, Method] = {"lora": LoRA(), "bias": Bias(), "ssf": SSF()}
"""The methods that plans of the laws may use."""

_SEED = 5


class RegulariserLaws:
    """Every regulariser passes these; inherit, name the class `Test...` and fill in `make`.

    The model is a small vision transformer with dropout in its base, so that a pass is noisy in training mode. `BROKEN`
    holds one regulariser per law that breaks this law and no other.

    Attributes:
        choices: the plan; override it for a regulariser that acts on other options.
    """

    choices: ClassVar[Choices] = (
        ("blocks.0.attn.qkv", "lora"),
        ("blocks.0.mlp.fc1", "ssf"),
        ("blocks.1.mlp.fc1", "lora"),
        ("blocks.1.mlp.fc1", "bias"),
    )

    def make(self) -> Regulariser:
        """The regulariser under test, with a weight that is not 0."""
        raise NotImplementedError

    def without(self) -> Regulariser:
        """The same with a weight of 0: its field `weight`, unless overridden."""
        return cast("Regulariser", dataclasses.replace(cast("Any", self.make()), weight=0.0))

    def test_a_weight_of_zero_changes_nothing(self) -> None:
        """Trained with a weight of 0, every weight and every loss is bit for bit that of a training without it."""
        plain, switched_off = self._trained({}), self._trained({"tested": self.without()})
        differing = [name for name, tensor in plain.items() if not torch.equal(tensor, switched_off[name])]
        assert not differing, f"with a weight of 0 training gives other {', '.join(differing[:5])}"

    def test_it_acts(self) -> None:
        """Trained with it, the weights are others."""
        plain = self._trained({})
        try:
            shaped = self._trained({"tested": self.make()})
        except Diverged:
            # It does act; that it is not finite is another law's matter.
            return
        assert any(not torch.equal(tensor, shaped[name]) for name, tensor in plain.items()), "it changes no training"

    def test_terms_and_gradients_are_finite(self) -> None:
        """From the very first step, where adapters change nothing yet."""
        for what, value in self._steps(4):
            assert bool(torch.isfinite(value).all()), f"the {what} is not finite"

    def test_model_mode_and_flags_are_left_alone(self) -> None:
        """A term leaves everything in the model as it was; adjusting touches no more than gradients."""
        with borrowed(self.choices) as inserted:
            terms, batches = self._begin(inserted), _batches()
            for mode in (True, False):
                inserted.train_mode(mode)
                with terms.watching(batches[0], 0, 10):
                    loss = ToyTask().loss(inserted.model, batches[0])
                before = facts(inserted.model)
                total = terms.added_to(loss)
                left = differences(before, facts(inserted.model))
                assert not left, f"after a term the model has other {', '.join(left[:5])}"
                torch.autograd.backward(total)
                before = {name: v for name, v in facts(inserted.model).items() if not name.endswith(": gradient")}
                terms.adjust()
                after = {name: v for name, v in facts(inserted.model).items() if not name.endswith(": gradient")}
                left = differences(before, after)
                assert not left, f"after the gradients were changed the model has other {', '.join(left[:5])}"
                for parameter in inserted.model.parameters():
                    parameter.grad = None

    def test_the_same_seed_gives_the_same_terms(self) -> None:
        """Two trainings of one seed agree in every term and gradient."""
        first, second = self._steps(4), self._steps(4)
        for (what, one), (_, other) in zip(first, second, strict=True):
            assert _alike(one, other), f"the same seed gives another {what}"

    def test_a_restored_term_goes_on_alike(self) -> None:
        """A term that takes up another's state in the middle gives what that one gives from there on."""
        with borrowed(self.choices) as inserted:
            inserted.train_mode()
            terms = self._begin(inserted)
            self._walk(inserted, terms, range(3))
            kept = {name: tensor.clone() for name, tensor in terms.state().items()}
            weights, noise = inserted.state(), torch.get_rng_state()
            whole = self._walk(inserted, terms, range(3, 6))
            inserted.load_state(weights)
            restored = self._begin(inserted)
            restored.load_state(kept)
            torch.set_rng_state(noise)
            for (what, one), (_, other) in zip(whole, self._walk(inserted, restored, range(3, 6)), strict=True):
                assert _alike(one, other), f"restored after 3 steps, it gives another {what}"

    def test_a_plan_without_adapters_trains(self) -> None:
        """Searches train heads alone as a baseline: a regulariser of adapters then does nothing."""
        try:
            for what, value in self._steps(2, ()):
                assert bool(torch.isfinite(value).all()), f"with the head alone the {what} is not finite"
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"the head alone cannot be trained with it: {error!r}") from error

    def _trained(self, regularisers: Mapping[str, Regulariser]) -> dict[str, Tensor]:
        with borrowed(self.choices) as inserted:
            settings = TrainSettings(epochs=2)
            task = ToyTask(n_inner=16)
            done = fit(
                inserted, task, settings, methods=METHODS, seed=_SEED, device="cpu", watch=None,
                regularisers=regularisers,
            )  # fmt: skip
            return {**inserted.state(), "losses": torch.tensor(done.losses, dtype=torch.float64)}

    def _begin(self, inserted: Inserted) -> Terms:
        return Terms(inserted, ToyTask(), {"tested": self.make()}, _SEED)

    def _steps(self, count: int, choices: Choices | None = None) -> list[tuple[str, Tensor]]:
        """What the first training steps are made of."""
        with borrowed(self.choices if choices is None else choices) as inserted:
            inserted.train_mode()
            return self._walk(inserted, self._begin(inserted), range(count))

    def _walk(self, inserted: Inserted, terms: Terms, steps: range) -> list[tuple[str, Tensor]]:
        """What each of some training steps is made of: what is added to the loss, and the gradients after all."""
        task, batches = ToyTask(), _batches()
        named = {name: p for name, p in inserted.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(named.values(), lr=0.1)
        found = []
        for step in steps:
            batch = batches[step % len(batches)]
            optimizer.zero_grad()
            with terms.watching(batch, step, 6):
                loss = task.loss(inserted.model, batch)
            total = terms.added_to(loss)
            assert total.ndim == 0, f"the loss of step {step} has shape {tuple(total.shape)}: a term is no scalar"
            found.append((f"term of step {step}", (total - loss).detach().clone()))
            torch.autograd.backward(total)
            terms.adjust()
            for name, parameter in named.items():
                if parameter.grad is not None:
                    found.append((f"gradient of {name} in step {step}", parameter.grad.clone()))
            optimizer.step()
        return found


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN being equal to NaN."""
    return torch.equal(one.nan_to_num(), other.nan_to_num())


@functools.lru_cache(maxsize=1)
def _catalog() -> Catalog:
    return scan(tiny_vit())


def _batches() -> list[Any]:
    return list(ToyTask().batches("inner", 1))


@contextmanager
def borrowed(choices: Choices) -> Iterator[Inserted]:
    """A small transformer with a plan in it, dropout of the base on in training mode; the random state is put back."""
    model, catalog = tiny_vit(), _catalog()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    options = []
    for name, key in choices:
        site, method = catalog[name], METHODS[key]
        size = method.sizes(site)[0]
        places = tuple(sorted(catalog.places(site, method.slots(site))))
        options.append(Option(name, key, size, method.cost(site, size), 0.0, places))
    plan = Allocation(tuple(options), Budget(10**9))
    with (
        torch.random.fork_rng(devices=[]),
        Native(base_dropout=True).insert(model, catalog, plan, METHODS, _SEED) as inserted,
    ):
        torch.manual_seed(_SEED)
        yield inserted
