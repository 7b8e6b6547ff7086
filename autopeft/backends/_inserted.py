"""A borrowed model with adapters in it: counting, grouping, saving, loading, merging."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autopeft.backends._forward import Switch, merge_into, parameter_names
from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Task
from autopeft.errors import ExportError, UsageError
from autopeft.methods.base import Adapter, Form, Part, Shared

__all__ = ["CHILD", "NativeInserted"]

CHILD = "autopeft_adapters"
"""Name of the child module of a host that holds its adapters."""


class NativeInserted:
    """What `Native.insert` yields; see `autopeft.core.contracts.Inserted`.

    `state`, `groups` and the counts also work after the model has been given back; `merged_state` and `train_mode`
    need the model and do not.

    Args:
        model: the borrowed model, adapters and trainable head in place.
        allocation: the plan.
        parts: option key to what it trains.
        heads: dotted path to trainable head module.
        base_modules: the modules of the plain model, without the original head.
        base_parameters: the parameters of the plain model.
        train_batch_norm: whether the base's BatchNorm statistics follow the data.
        base_dropout: whether the base's dropout and stochastic depth are on in training mode.
        switch: turns the adapters off.
    """

    def __init__(
        self,
        model: nn.Module,
        allocation: Allocation,
        parts: Mapping[str, Part],
        heads: Mapping[str, nn.Module],
        base_modules: Mapping[str, nn.Module],
        base_parameters: list[nn.Parameter],
        train_batch_norm: bool,
        base_dropout: bool,
        switch: Switch,
    ) -> None:
        self._model = model
        self._allocation = allocation
        self._parts = dict(parts)
        self._heads = dict(heads)
        self._base = dict(base_modules)
        self._frozen = {id(p) for p in base_parameters}
        self._train_batch_norm = train_batch_norm
        self._base_dropout = base_dropout
        self._switch = switch
        self._start = {path: copy.deepcopy(head).requires_grad_(False).eval() for path, head in heads.items()}
        self.open = True

    @property
    def model(self) -> nn.Module:
        """The borrowed model."""
        return self._model

    @property
    def allocation(self) -> Allocation:
        """The plan."""
        return self._allocation

    def named_adapters(self) -> dict[str, nn.Module]:
        """Option key (`site/method`) to adapter, in the plan's order."""
        return dict(self._parts)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters per method key, in the plan's order, and the head's under `head`."""
        groups: dict[str, list[nn.Parameter]] = {}
        for option in self._allocation:
            groups.setdefault(option.method, []).extend(self._parts[option.key].parameters())
        groups["head"] = [p for head in self._heads.values() for p in head.parameters()]
        return groups

    def trainable_count(self) -> int:
        """Scalars that require a gradient and are neither the base's nor the head's, found by walking the model."""
        head = {id(p) for p in self.groups()["head"]}
        roots = [self._model] if self.open else list(self._parts.values())
        found = {id(p): p.numel() for root in roots for p in root.parameters() if p.requires_grad}
        return sum(n for key, n in found.items() if key not in head and key not in self._frozen)

    def train_mode(self, mode: bool = True) -> None:
        """Set the mode of adapters and head; the base follows only as far as the backend was asked to.

        The frozen base is a feature extractor and stays in evaluation mode, so that its BatchNorm statistics do not
        move and its dropout and stochastic depth are off, unless `train_batch_norm` or `base_dropout` say otherwise.
        """
        self._need_open("the mode cannot be set")
        for module in self._base.values():
            asked = self._train_batch_norm if isinstance(module, _BatchNorm) else self._base_dropout
            module.training = mode and asked
        for name, module in self._model.named_modules():
            if name.rpartition(".")[2] == CHILD:
                module.train(mode)
        for head in self._heads.values():
            head.train(mode)

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that must be saved, by stable names; see `Inserted.state`.

        With `train_batch_norm`, the running statistics are listed as `buffer/MODULE/batch_norm/NAME`.
        """
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, part in self._parts.items():
            trained = dict(part.named_parameters())
            for name, tensor in part.state_dict(keep_vars=True).items():
                found[f"{'adapter' if name in trained else 'buffer'}/{key}/{name}"] = tensor
        return found | self._others()

    def _others(self) -> dict[str, Tensor]:
        """What is saved besides the adapters' tensors."""
        found: dict[str, Tensor] = {}
        if self._train_batch_norm:
            for path, module in self._base.items():
                if isinstance(module, _BatchNorm):
                    for name, buffer in module.named_buffers(recurse=False):
                        found[f"buffer/{path}/batch_norm/{name}"] = buffer
        for path, head in self._heads.items():
            for name, tensor in head.state_dict(keep_vars=True).items():
                found[f"head/{path}.{name}"] = tensor
        return found

    def stored(self) -> dict[str, Tensor]:
        """What the exported file holds; see `Inserted.stored`.

        Tensors that a method packs are listed as `packed/SITE/METHOD/NAME`, everything else as in `state`.
        """
        found: dict[str, Tensor] = {}
        for key, part in self._parts.items():
            trained, own = dict(part.named_parameters()), part.state_dict()
            for name, tensor in part.stored().items():
                kind = "packed" if name not in own else "adapter" if name in trained else "buffer"
                found[f"{kind}/{key}/{name}"] = tensor
        found |= self._others()
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def load_stored(self, state: Mapping[str, Tensor]) -> None:
        """Load what `stored` gave, all of it or nothing.

        Raises:
            UsageError: naming the tensors that are missing, unknown or of another shape.
        """
        mine = self.stored()
        _check_tensors(mine, state)
        for key, part in self._parts.items():
            own: dict[str, Tensor] = {}
            for kind in ("adapter", "buffer", "packed"):
                prefix = f"{kind}/{key}/"
                own |= {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            part.load_stored(own)
        with torch.no_grad():
            for name, tensor in self._others().items():
                tensor.copy_(state[name])

    def prepare(self, task: Task, seed: int) -> None:
        """Nothing: native methods start from the option and the host alone."""

    def advance(self, step: int, total: int) -> list[nn.Parameter]:
        """Tell every part; see `Inserted.advance`."""
        return [p for part in self._parts.values() if part.advance(step, total) for p in part.parameters()]

    def penalty(self) -> Tensor | None:
        """The sum of the parts' own terms."""
        found = [term for part in self._parts.values() if (term := part.penalty()) is not None]
        return torch.stack([term.float() for term in found]).sum() if found else None

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """See `Inserted.plain`."""
        self._need_open("there is no plain model to run")
        self._switch.on, before = False, self._switch.on
        held = {path: self._model.get_submodule(path.rpartition(".")[0]) for path in self._heads}
        try:
            for path, keeper in held.items():
                keeper._modules[path.rpartition(".")[2]] = self._start[path]
            with torch.no_grad():
                yield self._model
        finally:
            for path, keeper in held.items():
                keeper._modules[path.rpartition(".")[2]] = self._heads[path]
            self._switch.on = before

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` gave, all of it or nothing.

        Raises:
            UsageError: naming the tensors that are missing, unknown or of another shape, or buffers of an adapter (the
                entries of a sparse one) that differ from the plan's.
        """
        mine = self._tensors()
        _check_tensors(mine, state)
        for name, tensor in mine.items():
            if self._is_fixed(name) and not torch.equal(tensor.cpu(), state[name].to("cpu", tensor.dtype)):
                raise UsageError(f"{name} of the saved state differs from the plan's; load it with its own plan")
        with torch.no_grad():
            for name, tensor in mine.items():
                if not self._is_fixed(name):
                    tensor.copy_(state[name])

    def _is_fixed(self, name: str) -> bool:
        if not name.startswith("buffer/") or "/batch_norm/" in name:
            return False
        return not any(name == f"buffer/{key}/{moving}" for key, part in self._parts.items() for moving in part.moving)

    def merged_state(self) -> dict[str, Tensor]:
        """The plain model's state dict on the CPU, adapters merged in float64, the trained head in place.

        Raises:
            ExportError: when an option cannot be merged, naming it and why; or when a merged tensor is tied to
                another, which the plain model could not hold apart.
        """
        self._need_open("nothing can be merged")
        obstacles = [f"{key}: {part.obstacle}" for key, part in self._parts.items() if part.obstacle]
        if obstacles:
            raise ExportError(f"cannot merge {len(obstacles)} of the plan's options. {'; '.join(obstacles)}")
        full = self._model.state_dict(keep_vars=True)
        plain = {name: tensor for name, tensor in full.items() if CHILD not in name.split(".")}
        sharing: dict[int, list[str]] = {}
        for name, tensor in plain.items():
            sharing.setdefault(id(tensor), []).append(name)
        merged: dict[str, Tensor] = {}
        for key, exact in self._exact():
            prefix = f"{exact.site.module}." if exact.site.module else ""
            names = {prefix + name: name for name in parameter_names(exact).values()}
            for full_name in names:
                if full_name not in plain:
                    raise ExportError(f"cannot merge {key}: the model's state dict has no {full_name}")
            before = {name: merged.get(long, plain[long].detach().cpu().double()) for long, name in names.items()}
            after = dict(before)
            with torch.no_grad():
                merge_into(exact, after)
            for long, name in names.items():
                if after[name] is before[name]:
                    continue
                if len(sharing[id(plain[long])]) > 1:
                    raise ExportError(
                        f"cannot merge {key}: {long} is tied to "
                        f"{', '.join(n for n in sharing[id(plain[long])] if n != long)}"
                    )
                merged[long] = after[name]
        return {
            name: merged[name].to(tensor.dtype) if name in merged else tensor.detach().to("cpu", copy=True)
            for name, tensor in plain.items()
        }

    def _exact(self) -> list[tuple[str, Adapter]]:
        """Copies in float64 of all adapters, in the order in which a host's forward applies them."""
        order: tuple[Form, ...] = ("swap", "stand_in", "input", "branch", "output", "wrap")
        found: list[tuple[str, Adapter]] = []
        for key, part in self._parts.items():
            exact = copy.deepcopy(part).double().cpu()
            if isinstance(exact, Shared):
                found += [(key, adapter) for adapter in exact.adapters()]
            elif isinstance(exact, Adapter):
                found.append((key, exact))
        return sorted(found, key=lambda item: order.index(item[1].form))

    def _need_open(self, consequence: str) -> None:
        if not self.open:
            raise UsageError(
                f"the model has been given back, {consequence}; do it inside of `with backend.insert(...)`"
            )


def _check_tensors(mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(mine) - set(state)), sorted(set(state) - set(mine))
    if missing or unknown:
        parts = [f"missing: {', '.join(missing[:5])}"] if missing else []
        parts += [f"unknown: {', '.join(unknown[:5])}"] if unknown else []
        raise UsageError(
            f"the saved state belongs to another plan or another head ({len(missing)} tensors missing, "
            f"{len(unknown)} unknown; {'; '.join(parts)})"
        )
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise UsageError(
                f"{name} has shape {tuple(state[name].shape)} in the saved state, {tuple(tensor.shape)} in the model"
            )
