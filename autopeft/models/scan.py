"""A model's catalogue: every place that adapters can go on."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right

from torch import Tensor, nn

from autopeft.core.site import Catalog, Site, Slot
from autopeft.errors import UsageError
from autopeft.models._blocks import block_axis, block_paths, residual_branches
from autopeft.models._denoiser import is_denoiser
from autopeft.models._head import head_paths
from autopeft.models._roles import Host, fused_rows, held, host_of, is_activated, role_of
from autopeft.models._trace import Trace, trace

__all__ = ["scan"]


def scan(model: nn.Module, example: Tensor | None = None) -> Catalog:
    """List the sites of a model in model order.

    Linear and convolution weights, norms, layer scales, tokens and embeddings, and residual blocks. A fused qkv
    projection is listed whole, then as its row slices; a tied weight once, under its first name; the classifier is
    left out and becomes the head. A site that the forward pass does not call, or whose parameter it does not use,
    has no slots: BEiT, EVA and SwinV2 use `attn.qkv.weight` without calling `attn.qkv`, so that nothing put on that
    module would ever run. A block has the slot `tokens` when it runs on one token more than it was given: not with a
    relative position bias, rotary angles, windows or a mixing over positions.

    Args:
        model: the plain model, without adapters; may live on the meta device. It is left as it was found.
        example: images (B, C, H, W) for the watched forward pass; None takes the size that the model declares. Where
            no pass can be run, every site is taken to be called.

    Returns:
        The catalogue. Its `n_base` counts each parameter once and leaves out the classifier, whatever has slots.

    Raises:
        UsageError: when the model has no parameters besides its classifier.
    """
    head = head_paths(model)
    blocks = block_paths(model, head)
    return _Scanner(model, head, blocks, trace(model, example, blocks)).catalog()


class _Scanner:
    """The state of one scan."""

    def __init__(self, model: nn.Module, head: tuple[str, ...], blocks: tuple[str, ...], seen: Trace) -> None:
        self.model = model
        self.head = head
        self.seen = seen
        self.order = {name: i for i, name in enumerate(dict(model.named_modules()))}
        self.blocks = blocks
        if is_denoiser(model) and seen.watched:
            # A U-Net's middle is made after both of its arms and runs between them.
            self.order |= {name: i for i, name in enumerate(seen.called)}
            self.blocks = tuple(sorted(blocks, key=self.order.__getitem__))
        self.starts = [self.order[block] for block in self.blocks]
        self.listed: set[int] = set()
        self.sites: list[Site] = []

    def catalog(self) -> Catalog:
        for name, module in self.model.named_modules():
            if any(name == path or name.startswith(path + ".") for path in self.head):
                continue
            if name in self.blocks:
                self._block(name)
            host = host_of(module)
            if host is None:
                self._held(name, module)
            else:
                self._module(name, module, host)
        in_head = {id(p) for path in self.head for p in self.model.get_submodule(path).parameters()}
        base = [p for p in self.model.parameters() if id(p) not in in_head]
        if not base:
            raise UsageError(
                f"{type(self.model).__name__} has no parameters besides its classifier; there is nothing to adapt"
            )
        return Catalog(
            sites=tuple(self.sites),
            head=self.head,
            n_base=sum(p.numel() for p in base),
            n_head=sum(p.numel() for p in self.model.parameters() if id(p) in in_head),
            n_depth=max(1, len(self.blocks)),
            architecture=type(self.model).__name__,
        )

    def _inside(self, name: str) -> bool:
        return any(name == block or name.startswith(block + ".") for block in self.blocks)

    def _depth(self, name: str) -> int:
        """Blocks are counted from 0; what lies between two blocks belongs to the later one, which it feeds."""
        inside = next((i for i, b in enumerate(self.blocks) if name == b or name.startswith(b + ".")), None)
        if inside is not None:
            return inside
        return max(0, min(bisect_right(self.starts, self.order[name]), len(self.blocks) - 1))

    def _block(self, name: str) -> None:
        layout = block_axis(self.model, name, self.seen)
        if layout is None or not self.seen.calls(name):
            return
        channels, axis = layout
        self.sites.append(
            Site(
                name=name,
                module=name,
                kind="block",
                shape=(channels,),
                has_bias=False,
                depth=self._depth(name),
                role="block",
                slots=("output", "tokens") if name in self.seen.extended else ("output",),
                channel_axis=axis,
            )
        )
        for branch in residual_branches(self.model, name):
            found = block_axis(self.model, branch.path, self.seen)
            if found is None or found[0] != channels or not self.seen.calls(branch.path):
                continue
            self.sites.append(
                Site(
                    name=branch.path,
                    module=branch.path,
                    kind="residual",
                    shape=(channels,),
                    has_bias=False,
                    depth=self._depth(name),
                    role=branch.role,
                    slots=("output",),
                    channel_axis=found[1],
                    entry=branch.entry,
                )
            )

    def _held(self, name: str, module: nn.Module) -> None:
        """Parameters that a module holds directly."""
        for key, parameter in module.named_parameters(recurse=False):
            host = held(key, parameter)
            if host is None or not self._first(parameter):
                continue
            works = self.seen.calls(name) and self.seen.touches(parameter)
            slot: Slot = "weight" if host.kind == "layer_scale" else "tokens"
            self.sites.append(
                Site(
                    name=f"{name}.{key}" if name else key,
                    module=name,
                    kind=host.kind,
                    shape=tuple(parameter.shape),
                    has_bias=False,
                    depth=self._depth(name) if name else 0,
                    role=role_of(name, host.kind, self._inside(name), key),
                    slots=(slot,) if works else (),
                    parameter=key,
                    channel_axis=self._map_axis(name, int(parameter.shape[0])) if host.kind == "layer_scale" else -1,
                )
            )

    def _module(self, name: str, module: nn.Module, host: Host) -> None:
        weight = getattr(module, host.parameter)
        if not self._first(weight):
            return
        bias = getattr(module, "bias", None)
        site = Site(
            name=f"{name}.{host.parameter}" if host.kind == "tokens" else name,
            module=name,
            kind=host.kind,
            shape=tuple(weight.shape),
            has_bias=isinstance(bias, nn.Parameter),
            depth=self._depth(name),
            role=role_of(name, host.kind, self._inside(name), host.parameter),
            slots=self._slots(name, module, host),
            parameter=host.parameter,
            groups=host.groups,
            channel_axis=self._axis(name, host, int(weight.shape[0])),
        )
        rows = {}
        if isinstance(module, nn.Linear):
            rows = fused_rows(name, module, self.model.get_submodule(name.rpartition(".")[0]))
        self.sites.append(dataclasses.replace(site, parts=tuple(f"{name}[{part}]" for part in rows)))
        for part, (start, stop) in rows.items():
            self.sites.append(
                dataclasses.replace(
                    site,
                    name=f"{name}[{part}]",
                    shape=(stop - start, *site.shape[1:]),
                    role=f"attn.{part}",
                    rows=(start, stop),
                    parent=name,
                )
            )

    def _first(self, parameter: Tensor) -> bool:
        """Whether a parameter is met for the first time; a tied one is listed under its first name alone."""
        if id(parameter) in self.listed:
            return False
        self.listed.add(id(parameter))
        return True

    def _slots(self, name: str, module: nn.Module, host: Host) -> tuple[Slot, ...]:
        if not self.seen.calls(name):
            return ()
        if host.kind == "layer_scale":
            return ("weight",)
        if host.kind == "tokens":
            return ("tokens",)
        slots: list[Slot] = ["weight"]
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            slots.append("bias")
        # An output adapter on a norm that ends in an activation would act behind it, where nothing can be merged.
        if not is_activated(module):
            slots.append("output")
        return tuple(slots)

    def _axis(self, name: str, host: Host, channels: int) -> int:
        """The class tells the axis; the watched output corrects it where only one axis has that many channels."""
        shape = self.seen.outputs.get(name)
        if shape is None or len(shape) != 4 or host.kind not in ("layer_norm", "layer_scale"):
            return host.axis
        fitting = [axis for axis in (1, -1) if shape[axis] == channels]
        return fitting[0] if len(fitting) == 1 else host.axis

    def _map_axis(self, name: str, channels: int) -> int:
        """Channel axis of a layer scale that a block holds directly: that of the block's output."""
        if name not in self.blocks:
            return -1
        layout = block_axis(self.model, name, self.seen)
        return layout[1] if layout is not None and layout[0] == channels else -1
