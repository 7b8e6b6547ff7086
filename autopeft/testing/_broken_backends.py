"""Backends that break one law each; all are the native backend with one mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Backend, Inserted, Method
from autopeft.core.site import Catalog

__all__ = ["BROKEN"]

_MARK = "_autopeft_borrowed"


class _Proxy:
    """An insertion with some of its methods replaced."""

    def __init__(self, inner: Inserted, **replaced: Any) -> None:
        self._inner = inner
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._inner, name)


class _Wrapped:
    """The native backend; a subclass makes its mistake in one of the three methods."""

    def arguments(self, seed: int, head: Mapping[str, Tensor] | None, plan: Allocation) -> tuple[int, Any]:
        """Seed and head as they are passed on."""
        return seed, head

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """What happens while the model is borrowed."""
        yield

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        """What the caller is given."""
        return inner

    @contextmanager
    def insert(
        self,
        model: nn.Module,
        catalog: Catalog,
        allocation: Allocation,
        methods: Mapping[str, Method],
        seed: int = 0,
        head: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Inserted]:
        seed, head = self.arguments(seed, head, allocation)
        with self.around(model), Native().insert(model, catalog, allocation, methods, seed, head) as inner:
            yield self.inserted(inner, catalog)


class _LeavesFlags(_Wrapped):
    """Forgets to thaw a parameter when all goes well."""

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        yield
        next(model.parameters()).requires_grad_(False)


class _LeaksOnError(_Wrapped):
    """Cleans up after the body instead of in a `finally`."""

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        vars(model)["leak"] = None
        yield
        del vars(model)["leak"]


class _AllowsNesting(_Wrapped):
    """Does not remember that the model is borrowed."""

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        delattr(inner.model, _MARK)
        return inner

    @contextmanager
    def insert(self, model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Inserted]:
        with super().insert(model, *args, **kwargs) as inserted:
            try:
                yield inserted
            finally:
                setattr(model, _MARK, True)


class _Thawed(_Wrapped):
    """Leaves the base trainable, and wipes the traces."""

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        try:
            yield
        finally:
            for parameter in model.parameters():
                parameter.grad = None

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        for name, parameter in inner.model.named_parameters():
            if not name.startswith(catalog.head):
                parameter.requires_grad_(True)
        return inner


class _Miscounts(_Wrapped):
    """Counts the head as part of the plan."""

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        total = inner.trainable_count() + catalog.n_head
        return cast(Inserted, _Proxy(inner, trainable_count=lambda: total))


class _OneStream(_Wrapped):
    """Lets an option's start depend on how many others there are."""

    def arguments(self, seed: int, head: Mapping[str, Tensor] | None, plan: Allocation) -> tuple[int, Any]:
        return seed + 100 * len(plan), head


class _Forgiving(_Wrapped):
    """Loads what it finds and says nothing about the rest."""

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        def load_state(state: Mapping[str, Tensor]) -> None:
            mine = inner.state()
            inner.load_state({n: state[n] if n in state and state[n].shape == t.shape else t for n, t in mine.items()})

        return cast(Inserted, _Proxy(inner, load_state=load_state))


class _IgnoresHead(_Wrapped):
    """Starts from the model's own head whatever it is given, once it has seen that it fits."""

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        if self.own is not None:
            inner.load_state({**inner.state(), **self.own})
        return inner

    own: dict[str, Tensor] | None = None

    @contextmanager
    def insert(self, model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Inserted]:
        catalog: Catalog = args[0]
        state = model.state_dict()
        names = [name for name in state if name.startswith(tuple(f"{path}." for path in catalog.head))]
        self.own = {f"head/{name}": state[name].detach().clone() for name in names}
        with super().insert(model, *args, **kwargs) as inserted:
            yield inserted


class _Unmerged(_Wrapped):
    """Exports the base's weights with the trained head, adapters left out."""

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        def merged_state() -> dict[str, Tensor]:
            plain = inner.merged_state()
            held = {name: t.detach().clone() for name, t in inner.model.state_dict().items()}
            return {name: held[name] for name in plain}

        return cast(Inserted, _Proxy(inner, merged_state=merged_state))


class _TeachesItself(_Wrapped):
    """Gives the model as it is now for a teacher."""

    def inserted(self, inner: Inserted, catalog: Catalog) -> Inserted:
        @contextmanager
        def plain() -> Iterator[nn.Module]:
            with torch.no_grad():
                yield inner.model

        return cast(Inserted, _Proxy(inner, plain=plain))


BROKEN: dict[str, Callable[[], Backend]] = {
    "test_exit_restores_everything": _LeavesFlags,
    "test_exception_restores_everything": _LeaksOnError,
    "test_second_insertion_is_refused": _AllowsNesting,
    "test_base_is_frozen": _Thawed,
    "test_counts_agree": _Miscounts,
    "test_options_start_alike_in_every_plan": _OneStream,
    "test_state_round_trip": _Forgiving,
    "test_head_is_a_trainable_copy": _IgnoresHead,
    "test_merged_state_is_the_plain_model": _Unmerged,
    "test_plain_is_the_model_before_training": _TeachesItself,
}
"""Law to a backend that breaks it and no other."""
