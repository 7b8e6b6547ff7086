"""Laws of methods.

Subclass `MethodLaws` and give `make()`; pytest does the rest. `BROKEN` holds one method per law that breaks this law
and no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autopeft.backends.native import Native
from autopeft.core.contracts import GroupMethod, Inserted, Method
from autopeft.core.site import Site, Slot
from autopeft.errors import ExportError
from autopeft.methods.base import Adapter, Part, Shared
from autopeft.testing._broken_methods import BROKEN
from autopeft.testing._method_cases import KEY, Case, cases_of, ground_of, images, loss_of

__all__ = ["BROKEN", "MethodLaws"]

_STEP = 0.1


class MethodLaws:
    """Base class of methods' tests.

    Attributes:
        models: keys of the tiny models to try, `vit` and `convnet`.
        dtypes: precisions of the models.
        identity: whether the method claims to change nothing at step 0.
    """

    models: ClassVar[tuple[str, ...]] = ("vit", "convnet")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)
    identity: ClassVar[bool] = True

    def make(self) -> Method:
        """The method under test."""
        raise NotImplementedError

    def cases(self, dtypes: tuple[torch.dtype, ...] | None = None) -> Iterator[Case]:
        """One site of every kind that the method claims, at its smallest and largest size, in every precision."""
        found = 0
        for case in cases_of(self.make(), self.models, dtypes or self.dtypes):
            found += 1
            yield case
        assert found, f"the method can be used on no site of {', '.join(self.models)}"

    def test_identity_at_step_0(self) -> None:
        """A fresh adapter changes no output."""
        if not self.identity:
            return
        for case in self.cases():
            model = case.ground.model()
            x = images(case.ground.dtype)
            before = model(x)
            with self._inserted(case, model) as inserted:
                gap = _gap(inserted.model(x), before)
            assert gap <= _exact(case.ground.dtype), f"{case}: a fresh adapter changes the output by {gap:.2e}"

    def test_built_parameters_number_the_cost(self) -> None:
        """What is built and saved is what was paid for: scalars trained and stored, tensors, bits."""
        method = self.make()
        for case in self.cases((torch.float32,)):
            cost = method.cost(case.site, case.option.size)
            adapter = case.build(method)
            trained = sum(p.numel() for p in adapter.parameters())
            saved = list(adapter.stored().values())
            found = (
                trained,
                sum(t.numel() for t in saved),
                sum(8 * t.numel() * t.element_size() for t in saved),
                len(saved),
            )
            paid = (cost.trainable, cost.stored, cost.bits, cost.tensors)
            assert found == paid, f"{case}: built (trained, stored, bits, tensors) {found}, the cost says {paid}"

    def test_sizes_increase(self) -> None:
        """Sizes are positive and strictly increasing, prices follow; where there are no slots there is no size."""
        method = self.make()
        for name in self.models:
            catalog = ground_of(name, torch.float32).catalog
            for site in (*catalog, *catalog.groups()):
                sizes, slots = method.sizes(site), method.slots(site)
                assert bool(sizes) == bool(slots), f"{site.name}: slots {slots} but sizes {sizes}"
                for member, taken in _parts(method, site):
                    assert set(taken) <= set(member.slots), f"{member.name}: claims {taken}, works {member.slots}"
                assert all(a < b for a, b in zip((0, *sizes), sizes, strict=False)), f"{site.name}: sizes {sizes}"
                prices = [method.cost(site, size).trainable for size in sizes]
                assert sorted(set(prices)) == prices, f"{site.name}: prices {prices} of sizes {sizes}"

    def test_gradients_flow(self) -> None:
        """No gradient is None, and every parameter has had one that is not zero by step 2, or the part's `patience`."""
        for case in self.cases():
            with self._inserted(case, case.ground.model()) as inserted:
                inserted.train_mode()
                alive: set[str] = set()
                part = inserted.named_adapters()[case.option.key]
                assert isinstance(part, Part)
                named = dict(part.named_parameters())
                assert named, f"{case}: nothing to train"
                for step in range(1, part.patience + 1):
                    _train(inserted, case, 1)
                    missing = [name for name, p in named.items() if p.grad is None]
                    assert not missing, f"{case}: no gradient at step {step} for {missing}"
                    alive |= {name for name, p in named.items() if p.grad is not None and bool(p.grad.any())}
                assert alive == set(named), (
                    f"{case}: zero gradient through step {step} for {sorted(set(named) - alive)}"
                )

    def test_merged_equals_unmerged(self) -> None:
        """The plain model with the merged weights gives the outputs of the model with the adapter in it."""
        merges, moved = False, 0.0
        for case in self.cases():
            model, x = case.ground.model(), images(case.ground.dtype)
            with self._inserted(case, model) as inserted:
                _disturb(inserted)
                adapted = inserted.model(x)
                adapter = inserted.named_adapters()[case.option.key]
                assert isinstance(adapter, Adapter | Shared)
                try:
                    state = inserted.merged_state()
                except ExportError:
                    assert not adapter.mergeable, f"{case}: says that it merges and does not"
                    continue
                assert adapter.mergeable, f"{case}: merges although it says {adapter.obstacle!r}"
            before = model(x)
            gap = _gap(functional_call(model, state, (x,), strict=True), adapted)
            merges, moved = True, max(moved, _gap(adapted, before))
            assert gap <= _close(case.ground.dtype), f"{case}: merged and unmerged outputs differ by {gap:.2e}"
        # Kernelised changes are small; still several times what counts as equal.
        enough = moved > 5 * _close(torch.float32)
        assert enough or not merges, f"disturbed parameters change no output: at most by {moved:.2e}"

    def test_mergeable_is_known_before_building(self) -> None:
        """The method says of a site what the adapter built there says of itself."""
        method = self.make()
        for case in self.cases((torch.float32,)):
            with self._inserted(case, case.ground.model()) as inserted:
                adapter = inserted.named_adapters()[case.option.key]
                assert isinstance(adapter, Adapter | Shared)
                said = method.mergeable(case.site)
                assert said == adapter.mergeable, f"{case}: said mergeable={said}, built {adapter.mergeable}"

    def test_loaded_into_a_fresh_base(self) -> None:
        """What was saved, loaded into another model that was initialised from another seed, gives the same output."""
        for case in self.cases():
            x = images(case.ground.dtype)
            with self._inserted(case, case.ground.model(), seed=1) as inserted:
                _disturb(inserted)
                state, stored, saved = inserted.state(), inserted.stored(), inserted.model(x)
            with self._inserted(case, case.ground.model(twin=1), seed=2) as inserted:
                inserted.load_state(state)
                gap = _gap(inserted.model(x), saved)
            assert gap <= _exact(case.ground.dtype), f"{case}: the reloaded output differs by {gap:.2e}"
            if stored.keys() == state.keys():
                continue
            with self._inserted(case, case.ground.model(twin=1), seed=3) as inserted:
                inserted.load_stored(stored)
                gap = _gap(inserted.model(x), saved)
            assert gap <= _close(case.ground.dtype), f"{case}: the output of the packed file differs by {gap:.2e}"

    def test_only_claimed_places_change(self) -> None:
        """Training leaves the base alone, and merging touches the claimed tensors' rows alone."""
        for case in self.cases((torch.float32,)):
            model = case.ground.model()
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            base, base_rows = dict(model.named_parameters()), _host_output(model, case.site, images(torch.float32))
            with self._inserted(case, model) as inserted:
                inserted.train_mode()
                _train(inserted, case, 2)
                head = [f"{path}." for path in case.ground.catalog.head]
                moved = [n for n, p in base.items() if not torch.equal(p, before[n])]
                assert not moved, f"{case}: training changed the base's {moved}"
                _disturb(inserted)
                rows = _host_output(inserted.model, case.site, images(torch.float32))
                gap = _outside(case.site, rows, base_rows)
                assert gap <= 1e-6, f"{case}: output rows outside of the site change by {gap:.2e}"
                part = inserted.named_adapters()[case.option.key]
                assert isinstance(part, Adapter | Shared)
                claimed = _parts(self.make(), case.site)
                acting = (part,) if isinstance(part, Adapter) else part.adapters()
                acts = {a.site.name: a.slots for a in acting}
                claims = {site.name: slots for site, slots in claimed}
                assert acts == claims, f"{case}: acts on {acts}, claims {claims}"
                if not part.mergeable:
                    continue
                merged = inserted.merged_state()
            for name, tensor in merged.items():
                if not name.startswith(tuple(head)):
                    changed = tensor != before[name]
                    free = all(_unclaimed(site, slots, name, changed) for site, slots in claimed)
                    assert not free, f"{case}: merging changes {name}"

    def test_build_is_deterministic(self) -> None:
        """The given generator is the only randomness, its state decides everything, and host and choice stay."""
        method = self.make()
        for case in self.cases((torch.float32,)):
            evidence = case.evidence()
            again = method.select(case.site, evidence, case.option.size)
            assert again == case.option.indices, f"{case}: selects other entries the second time"
            model = case.ground.model()
            host = model.get_submodule(case.site.module)
            before = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
            torch.manual_seed(1)
            random_state = torch.get_rng_state()
            first = method.build(case.site, case.option, host, torch.Generator().manual_seed(5))
            assert torch.equal(torch.get_rng_state(), random_state), f"{case}: draws from the global random state"
            torch.manual_seed(2)
            second = method.build(case.site, case.option, host, torch.Generator().manual_seed(5))
            one, two = ({**dict(a.named_parameters()), **dict(a.named_buffers())} for a in (first, second))
            differing = [name for name in one if not torch.equal(one[name], two[name])]
            assert not differing, f"{case}: two builds from one seed differ in {differing}"
            after = model.state_dict(keep_vars=True)
            touched = [n for n, (i, t) in before.items() if id(after[n]) != i or not torch.equal(after[n], t)]
            assert list(after) == list(before), f"{case}: building changes the host's tensors"
            assert not touched, f"{case}: building changes the host's {touched}"

    def test_gains_grow_with_size(self) -> None:
        """Gains are finite, not negative, as many as the sizes, never lower for a larger one, and repeatable."""
        method = self.make()
        for case in self.cases((torch.float32,)):
            sizes, evidence = method.sizes(case.site), case.evidence()
            gains = method.gains(case.site, evidence, sizes)
            assert len(gains) == len(sizes), f"{case}: {len(gains)} gains for {len(sizes)} sizes"
            assert all(math.isfinite(g) and g >= 0 for g in gains), f"{case}: gains {gains}"
            falls = [s for s, a, b in zip(sizes[1:], gains, gains[1:], strict=False) if b < a * (1 - 1e-9)]
            assert not falls, f"{case}: the gain falls at sizes {falls}"
            assert method.gains(case.site, evidence, sizes) == gains, f"{case}: other gains the second time"
            alone = method.gains(case.site, evidence, sizes[:1])
            assert math.isclose(alone[0], gains[0], rel_tol=1e-4, abs_tol=1e-12), (
                f"{case}: a size alone gains otherwise"
            )

    def _inserted(self, case: Case, model: nn.Module, seed: int = 0) -> AbstractContextManager[Inserted]:
        return Native().insert(model, case.ground.catalog, case.allocation, {KEY: self.make()}, seed)


def _parts(method: Method, site: Site) -> tuple[tuple[Site, tuple[Slot, ...]], ...]:
    """The sites that an option changes, with the slots it occupies there."""
    if site.kind == "group":
        return method.parts(site) if isinstance(method, GroupMethod) else ()
    slots = method.slots(site)
    return ((site, slots),) if slots else ()


def _exact(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-12


def _close(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-10


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max())


def _train(inserted: Inserted, case: Case, steps: int) -> None:
    """Plain gradient steps on adapters and head."""
    parameters = [p for group in inserted.groups().values() for p in group]
    for _ in range(steps):
        for p in parameters:
            p.grad = None
        torch.autograd.backward(loss_of(inserted.model(images(case.ground.dtype))))
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=_STEP)


def _disturb(inserted: Inserted) -> None:
    """Move every adapter parameter to where nothing is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in inserted.named_adapters().values():
            for p in adapter.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p) + 0.05)


def _host_output(model: nn.Module, site: Site, x: Tensor) -> Tensor | None:
    """The host's output in a forward pass; None for tokens, whose host is seen through the whole model."""
    if site.kind in ("tokens", "group"):
        return None
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        kept.append(output.detach())

    handle = model.get_submodule(site.module).register_forward_hook(hook)
    try:
        model(x)
    finally:
        handle.remove()
    return kept[0]


def _outside(site: Site, one: Tensor | None, other: Tensor | None) -> float:
    """Largest difference between two host outputs on the rows that do not belong to the site."""
    if site.rows is None or one is None or other is None:
        return 0.0
    keep = torch.ones(one.shape[site.channel_axis], dtype=torch.bool)
    keep[site.rows[0] : site.rows[1]] = False
    return _gap(one.movedim(site.channel_axis, -1)[..., keep], other.movedim(site.channel_axis, -1)[..., keep])


def _unclaimed(site: Site, claimed: tuple[str, ...], name: str, changed: Tensor) -> bool:
    """Whether a merged tensor differs from the base where the option may not change it."""
    prefix = f"{site.module}." if site.module else ""
    names = {"weight": site.parameter, "bias": "bias", "tokens": site.parameter}
    slots: tuple[str, ...] = ("weight", "bias") if "output" in claimed else claimed
    if name not in {prefix + names[slot] for slot in slots}:
        return bool(changed.any())
    if site.rows is None:
        return False
    return bool(changed[: site.rows[0]].any() or changed[site.rows[1] :].any())
