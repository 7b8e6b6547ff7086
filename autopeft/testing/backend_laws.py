"""Laws of backends.

Subclass `BackendLaws` and give `make()`; pytest does the rest. `BROKEN` holds one backend per law that breaks this law
and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Backend, Inserted, Method
from autopeft.core.menu import Option
from autopeft.errors import ExportError, UsageError
from autopeft.methods.bias import Bias
from autopeft.methods.block_adapter import BlockAdapter
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.ssf import SSF
from autopeft.methods.tokens import Tokens
from autopeft.testing._broken_backends import BROKEN
from autopeft.testing._method_cases import MODELS, Ground, ground_of, images, loss_of
from autopeft.testing._model_facts import differences, facts

__all__ = ["BROKEN", "BackendLaws", "Plan"]

_METHODS: Mapping[str, Method] = {
    "lora": LoRA(),
    "core": Core(),
    "bias": Bias(),
    "norm": Norm(),
    "ssf": SSF(),
    "block_adapter": BlockAdapter(),
    "tokens": Tokens(),
}

_PLANS: Mapping[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "vit": (
        "vit",
        (
            ("cls_token", "tokens"),
            ("blocks.0.norm1", "norm"),
            ("blocks.0.attn.qkv[q]", "lora"),
            ("blocks.0.attn.qkv[v]", "core"),
            ("blocks.0.attn.qkv", "bias"),
            ("blocks.1.mlp.fc1", "lora"),
            ("blocks.1.mlp.fc1", "ssf"),
        ),
    ),
    "convnet": (
        "convnet",
        (("norm", "norm"), ("blocks.0.conv1", "lora"), ("blocks.0.conv2", "core"), ("blocks.0.conv2", "ssf")),
    ),
    "unmergeable": ("convnet", (("blocks.1", "block_adapter"), ("blocks.1.conv2", "lora"))),
    "head only": ("vit", ()),
}


@dataclass(frozen=True)
class Plan:
    """A model with a plan for it.

    Attributes:
        name: what to call it in messages.
        ground: the model and its catalogue.
        allocation: the plan.
    """

    name: str
    ground: Ground
    allocation: Allocation

    def model(self) -> nn.Module:
        """A new model; not shared, since a backend that is broken gives it back otherwise."""
        return MODELS[self.ground.name]()

    @classmethod
    def of(cls, name: str, ground: Ground, choices: tuple[tuple[str, str], ...]) -> Plan:
        """The plan that puts the smallest size but one of each method on its site."""
        options = []
        for site_name, key in choices:
            site, method = ground.catalog[site_name], _METHODS[key]
            size = method.sizes(site)[:2][-1]
            places = tuple(sorted(ground.catalog.places(site, method.slots(site))))
            options.append(Option(site_name, key, size, method.cost(site, size), 0.0, places))
        return cls(name, ground, Allocation(tuple(options), Budget(10**9)))


class BackendLaws:
    """Base class of backends' tests.

    Attributes:
        plans: names of the plans to try: `vit`, `convnet`, `unmergeable`, `head only`.
    """

    plans: ClassVar[tuple[str, ...]] = tuple(_PLANS)

    def make(self) -> Backend:
        """The backend under test."""
        raise NotImplementedError

    def each_plan(self) -> Iterator[Plan]:
        """The plans."""
        for name in self.plans:
            model, choices = _PLANS[name]
            yield Plan.of(name, ground_of(model, torch.float32), choices)

    def test_exit_restores_everything(self) -> None:
        """After training inside, the model is bit for bit and object for object what it was."""
        for plan in self.each_plan():
            for mode in (False, True):
                model = plan.model().train(mode)
                before = facts(model)
                with self.insert(plan, model) as inserted:
                    inserted.train_mode()
                    _train(inserted)
                    inserted.train_mode(False)
                left = differences(before, facts(model))
                model.eval()
                assert not left, f"{plan.name}: the model is given back with other {', '.join(left[:5])}"

    def test_exception_restores_everything(self) -> None:
        """The same after an exception in the body, or in the insertion itself."""
        for plan in self.each_plan():
            model = plan.model()
            before = facts(model)
            try:
                with self.insert(plan, model) as inserted:
                    inserted.train_mode()
                    _train(inserted)
                    raise _Stop
            except _Stop:
                pass
            left = differences(before, facts(model))
            assert not left, f"{plan.name}: after an exception the model has other {', '.join(left[:5])}"
            try:
                with self.insert(plan, model, head={"nonsense": torch.zeros(1)}):
                    raise AssertionError(f"{plan.name}: a head that does not fit was accepted")
            except UsageError:
                pass
            left = differences(before, facts(model))
            assert not left, f"{plan.name}: after a refused insertion the model has other {', '.join(left[:5])}"

    def test_second_insertion_is_refused(self) -> None:
        """A model that is borrowed cannot be borrowed again, and the first insertion goes on working."""
        for plan in self.each_plan():
            model, x = plan.model(), images(torch.float32)
            with self.insert(plan, model) as inserted:
                _disturb(inserted)
                before = inserted.model(x)
                try:
                    with self.insert(plan, model):
                        raise AssertionError(f"{plan.name}: the borrowed model was borrowed again")
                except UsageError:
                    pass
                assert torch.equal(inserted.model(x), before), f"{plan.name}: the refusal disturbs the first insertion"

    def test_base_is_frozen(self) -> None:
        """Training moves no base tensor, BatchNorm statistics included, and gives none a gradient."""
        for plan in self.each_plan():
            model = plan.model()
            base = {name: (p, p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()}
            with self.insert(plan, model) as inserted:
                inserted.train_mode()
                _train(inserted)
                trained = [n for n, (p, _) in base.items() if p.requires_grad and n in dict(model.named_parameters())]
                head = tuple(f"{path}." for path in plan.ground.catalog.head)
                trained = [name for name in trained if not name.startswith(head)]
                assert not trained, f"{plan.name}: {', '.join(trained[:5])} of the base require gradients"
                moved = [name for name, (p, value) in base.items() if not torch.equal(p, value)]
                assert not moved, f"{plan.name}: training moved {', '.join(moved[:5])} of the base"

    def test_counts_agree(self) -> None:
        """The count by walking, the groups, the saved state and the plan's price are the same number."""
        for plan in self.each_plan():
            with self.insert(plan) as inserted:
                groups = inserted.groups()
                in_groups = sum(p.numel() for key, group in groups.items() if key != "head" for p in group)
                saved = sum(t.numel() for name, t in inserted.state().items() if name.startswith("adapter/"))
                head = sum(p.numel() for p in groups["head"])
                found = (inserted.trainable_count(), in_groups, saved, head)
                wanted = (*(plan.allocation.trainable,) * 3, plan.ground.catalog.n_head)
                assert found == wanted, f"{plan.name}: walked, grouped, saved, head {found}, expected {wanted}"
                assert list(inserted.named_adapters()) == [option.key for option in plan.allocation]

    def test_options_start_alike_in_every_plan(self) -> None:
        """An option's initial values depend on seed and option alone, not on what else is in the plan."""
        for plan in self.each_plan():
            with self.insert(plan, seed=3) as inserted:
                together = inserted.state()
            for option in plan.allocation:
                alone = Plan(plan.name, plan.ground, Allocation((option,), Budget(10**9)))
                with self.insert(alone, seed=3) as inserted:
                    state = inserted.state()
                differing = [n for n, t in state.items() if not torch.equal(t, together[n])]
                assert not differing, f"{plan.name}: alone {option.key} starts with other {', '.join(differing)}"
            if "lora" in {option.method for option in plan.allocation}:
                with self.insert(plan, seed=4) as inserted:
                    other = inserted.state()
                assert any(not torch.equal(other[n], t) for n, t in together.items()), f"{plan.name}: seed is ignored"

    def test_state_round_trip(self) -> None:
        """A saved state gives the same outputs in another model; a state that does not fit is refused whole."""
        for plan in self.each_plan():
            x = images(torch.float32)
            with self.insert(plan, seed=1) as inserted:
                _disturb(inserted)
                state, output = inserted.state(), inserted.model(x)
            with self.insert(plan, plan.model(), seed=2) as inserted:
                inserted.load_state(state)
                gap = float((inserted.model(x) - output).detach().abs().max())
                assert gap <= 1e-6, f"{plan.name}: the reloaded model's output differs by {gap:.2e}"
                for what, bad in _misfits(state):
                    try:
                        inserted.load_state(bad)
                    except UsageError:
                        now = inserted.state()
                        assert all(torch.equal(now[n], t) for n, t in state.items()), f"{plan.name}: half loaded"
                        continue
                    raise AssertionError(f"{plan.name}: a state with {what} was accepted")

    def test_head_is_a_trainable_copy(self) -> None:
        """The head starts from its own or the given values, trains, and leaves the original alone."""
        for plan in self.each_plan():
            model = plan.model()
            own = {
                f"{path}.{name}": tensor.detach().clone()
                for path in plan.ground.catalog.head
                for name, tensor in model.get_submodule(path).state_dict().items()
            }
            given = {name: tensor + 1 for name, tensor in own.items()}
            for start, head in ((own, None), (given, given)):
                with self.insert(plan, model, head=head) as inserted:
                    state = inserted.state()
                    wrong = [n for n, t in start.items() if not torch.equal(state[f"head/{n}"], t)]
                    assert not wrong, f"{plan.name}: the head does not start from {', '.join(wrong)}"
                    inserted.train_mode()
                    _train(inserted)
                    state = inserted.state()
                    stuck = [n for n, t in start.items() if torch.equal(state[f"head/{n}"], t)]
                    assert not stuck, f"{plan.name}: the head does not train {', '.join(stuck)}"
                after = model.state_dict()
                assert all(torch.equal(after[n], t) for n, t in own.items()), f"{plan.name}: the original head trained"

    def test_merged_state_is_the_plain_model(self) -> None:
        """Merged, it has the plain model's keys in order and gives the adapted outputs; else it names the obstacle."""
        for plan in self.each_plan():
            model, x = plan.model(), images(torch.float32)
            plain = [(name, t.shape, t.dtype) for name, t in model.state_dict().items()]
            with self.insert(plan, model) as inserted:
                inserted.train_mode()
                _train(inserted)
                inserted.train_mode(False)
                _disturb(inserted)
                output = inserted.model(x)
                try:
                    state = inserted.merged_state()
                except ExportError as error:
                    assert plan.name == "unmergeable", f"{plan.name}: cannot be merged: {error}"
                    assert "block_adapter" in str(error), f"{plan.name}: the message names no option: {error}"
                    continue
            assert plan.name != "unmergeable", "an adapter that cannot be merged was left out without a word"
            assert [(n, t.shape, t.dtype) for n, t in state.items()] == plain, f"{plan.name}: other tensors"
            gap = float((functional_call(model, state, (x,)) - output).detach().abs().max())
            assert gap <= 1e-5, f"{plan.name}: merged and unmerged outputs differ by {gap:.2e}"

    def test_plain_is_the_model_before_training(self) -> None:
        """Inside of `plain` outputs are those of the plain model with the starting head; after it nothing is new."""
        for plan in self.each_plan():
            model, x = plan.model(), images(torch.float32)
            heads = [model.get_submodule(path) for path in plan.ground.catalog.head]
            given = {
                f"{path}.{name}": tensor + 1
                for path, head in zip(plan.ground.catalog.head, heads, strict=True)
                for name, tensor in head.state_dict().items()
            }
            with torch.no_grad():
                before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                own, other = model(x), functional_call(model, {**before, **given}, (x,))
            for start, wanted in ((None, own), (given, other)):
                with self.insert(plan, model, head=start) as inserted:
                    inserted.train_mode()
                    _train(inserted)
                    _disturb(inserted)
                    adapted, found = inserted.model(x).detach(), facts(inserted.model)
                    with inserted.plain() as teacher:
                        output = teacher(x)
                    gap = float((output.detach() - wanted).abs().max())
                    assert gap <= 1e-6, f"{plan.name}: the plain model's output differs by {gap:.2e}"
                    assert not output.requires_grad, f"{plan.name}: the plain model makes a graph"
                    left = differences(found, facts(inserted.model))
                    assert not left, f"{plan.name}: after `plain` the model has other {', '.join(left[:5])}"
                    assert torch.equal(inserted.model(x), adapted), f"{plan.name}: after `plain` the output is another"

    def insert(
        self, plan: Plan, model: nn.Module | None = None, seed: int = 0, head: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[Inserted]:
        """Insert a plan into a model, a new one when none is given."""
        borrowed = plan.model() if model is None else model
        return self.make().insert(borrowed, plan.ground.catalog, plan.allocation, _METHODS, seed, head)


class _Stop(Exception):
    """Raised in a body."""


def _train(inserted: Inserted) -> None:
    parameters = [p for group in inserted.groups().values() for p in group]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(inserted.model(images(torch.float32))))
        optimizer.step()


def _disturb(inserted: Inserted) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in inserted.groups().values():
            for p in group:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def _misfits(state: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    first = next(iter(state))
    yield "a tensor missing", {name: tensor for name, tensor in state.items() if name != first}
    yield "an unknown tensor", {**state, "adapter/nowhere/lora/A": torch.zeros(1)}
    yield "a tensor of another shape", {**state, first: torch.zeros(3, 5, 7)}
