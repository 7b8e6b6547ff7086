"""The model of a step's cost against what torch counts and which bytes stay alive, on plans that are inserted."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopeft.backends.native import Native
from autopeft.config.study import Study
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.menu import Indices, Menu, Option
from autopeft.core.places import places_of
from autopeft.models.scan import scan
from autopeft.pipeline.usage import step_usage
from autopeft.testing.memory import LiveBytes
from autopeft.testing.tiny import tiny_convnet

BATCH = 6
METHODS = dict(Study().methods)


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=4, num_classes=4, embed_dim=32, depth=2, num_heads=4)


MODELS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "convnet": tiny_convnet}


class Ground:
    """A small model with every default method on its menu, and the model of what options cost."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = make().eval()
        self.catalog = scan(self.model)
        sites = {s.name: s for s in self.catalog.offered("slices")}
        self.menu = Menu(
            tuple(
                Option(s.name, key, size, m.cost(s, size), 1.0, places)
                for s in sites.values()
                for key, m in METHODS.items()
                if (places := places_of(self.catalog, m, s))
                for size in _some(m.sizes(s))
            ),
            sites,
        )
        with Native().insert(self.model, self.catalog, Allocation((), Budget(0)), {}) as inserted:
            inserted.train_mode(True)
            self.flops, self.memory = step_usage(
                inserted.model, self.catalog, METHODS, self.menu, lambda n: loss(inserted.model, n), BATCH
            )

    def measured(self, options: Iterable[Option]) -> tuple[float, float]:
        """FLOPs of a step, and bytes alive between its forward and its backward pass, of a plan that is inserted."""
        plan = Allocation(tuple(_with_entries(o) for o in options), Budget(10**9))
        with Native().insert(self.model, self.catalog, plan, METHODS) as inserted:
            inserted.train_mode(True)
            with FlopCounterMode(display=False) as counter:
                loss(inserted.model, BATCH).backward()
            inserted.model.zero_grad(set_to_none=True)
            with LiveBytes([*inserted.model.parameters(), *inserted.model.buffers()]) as alive:
                before = alive.live
                value = loss(inserted.model, BATCH)
                kept = alive.live - before
            del value
        return float(counter.get_total_flops()), float(kept)


def loss(model: nn.Module, n: int) -> Tensor:
    images = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(model(images), torch.arange(n) % 4)


def _some(sizes: Sequence[int]) -> list[int]:
    """Five: the model looks at three and, to check itself, at a fourth; the fifth it must tell from those."""
    return sorted({sizes[i * (len(sizes) - 1) // 4] for i in range(5)})


def _with_entries(o: Option) -> Option:
    chosen = o.method.startswith("sparse")
    return dataclasses.replace(o, indices=Indices(np.arange(o.size, dtype=np.int64))) if chosen else o


def compatible(options: Iterable[Option], most: int) -> list[Option]:
    chosen: list[Option] = []
    for o in options:
        if len(chosen) < most and not {p for c in chosen for p in c.places} & set(o.places):
            chosen.append(o)
    return chosen


@functools.cache
def made(name: str) -> Ground:
    return Ground(MODELS[name])


@pytest.fixture(params=MODELS)
def ground(request: pytest.FixtureRequest) -> Ground:
    return made(request.param)


@pytest.fixture
def transformer() -> Ground:
    return made("vit")


def check(ground: Ground, plan: list[Option], flops: float = 0.01) -> None:
    """Bytes within one in a hundred of what is measured, FLOPs too or within what is said."""
    counted, kept = ground.measured(plan)
    names = ", ".join(f"{o.key} {o.size}" for o in plan)
    assert abs(ground.flops.used(plan) / counted - 1) <= flops, f"{ground.flops.used(plan)} of {counted}: {names}"
    assert abs(ground.memory.used(plan) / kept - 1) <= 0.01, f"{ground.memory.used(plan)} of {kept}: {names}"


@pytest.mark.parametrize("method", METHODS)
def test_one_method_everywhere_and_at_single_places(ground: Ground, method: str) -> None:
    order = [o for o in ground.menu if o.method == method]
    random.Random(method).shuffle(order)
    if not order:
        assert method == "tokens"
        return
    for option in order[:3]:
        check(ground, [option])
    check(ground, compatible(order, 99))


def test_mixed_plans(ground: Ground) -> None:
    draw = random.Random(0)
    for _ in range(12):
        order = list(ground.menu)
        draw.shuffle(order)
        # Of two options on one host it is not known that gradients travel through one to the other.
        check(ground, compatible(order, draw.randint(2, 20)), 0.02)


def test_nothing_but_the_head(ground: Ground) -> None:
    check(ground, [])


def test_hand_worked_lora(transformer: Ground) -> None:
    """Of rank r on the last fc2, T tokens: every product of T rows by in x r or r x out takes 2 T r in or 2 T r out.

    Forward one of each; backward the two factors' gradients and that of what is between; that of the input only where
    somebody in front asks for it. It keeps T r numbers besides fc2's input.
    """
    o = next(o for o in transformer.menu if o.site == "blocks.1.mlp.fc2" and o.method == "lora")
    tokens, ident = BATCH * 17, (o.site, o.method, o.size)
    assert transformer.flops.own[ident] == pytest.approx(2 * tokens * o.size * (128 + 32 + 128 + 32 + 32))
    ((_, passing),) = transformer.flops.extra[ident]
    assert passing == pytest.approx(2 * tokens * o.size * 128)
    assert transformer.memory.own[ident] == 4 * tokens * o.size


def test_an_early_option_costs_more_than_a_late_one(transformer: Ground) -> None:
    first, last = (
        next(o for o in transformer.menu if o.site == f"blocks.{b}.mlp.fc1" and o.method == "bias") for b in (0, 1)
    )
    for cap in (transformer.flops, transformer.memory):
        assert cap.own[(first.site, "bias", 1)] == cap.own[(last.site, "bias", 1)]
        assert cap.used([first]) > 1.1 * cap.used([last])
        assert cap.used([first, last]) < cap.used([first]) + cap.used([last])


@pytest.mark.parametrize("forgotten", ["terms", "own", "extra"])
def test_a_model_that_forgets_is_caught(transformer: Ground, forgotten: str) -> None:
    lame = copy.copy(transformer)
    without = {"terms": {"terms": (), "triggers": {}, "extra": {}}, "own": {"own": {}}, "extra": {"extra": {}}}
    lame.flops = dataclasses.replace(transformer.flops, **without[forgotten])  # type: ignore[arg-type]  # of several
    with pytest.raises(AssertionError):
        check(lame, compatible([o for o in transformer.menu if o.method == "lora" and o.size > 1], 99))
