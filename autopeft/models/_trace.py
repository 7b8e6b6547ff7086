"""One forward pass that is only watched: which modules are called, which parameters are touched, what comes out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from autopeft.models._denoiser import example_call

__all__ = ["Trace", "example_of", "first_parameter", "frozen_run", "trace"]

_METADATA = frozenset(
    {"shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout", "grad", "is_meta", "is_quantized"}
)
"""Attributes whose reading does not use a tensor's values."""


@dataclass(slots=True)
class Trace:
    """What one forward pass showed.

    Attributes:
        called: modules in order of their first call, with the number of calls, by dotted path.
        outputs: shape of the output of the last call, where the output is one tensor.
        touched: identities of the parameters that some tensor operation took as an argument.
        extended: of the modules that were to be tried with a further token, those that take it.
        watched: whether a forward pass ran at all; nothing is known when False.
        reason: why none ran.
    """

    called: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    extended: set[str] = field(default_factory=set)
    watched: bool = False
    reason: str = ""

    def calls(self, module: str) -> bool:
        """Whether a module's forward runs; taken for granted when nothing was watched."""
        return not self.watched or module in self.called

    def touches(self, parameter: Tensor) -> bool:
        """Whether a parameter is used; taken for granted when nothing was watched."""
        return not self.watched or id(parameter) in self.touched


def trace(model: nn.Module, example: Tensor | None = None, extend: Collection[str] = ()) -> Trace:
    """Watch one forward pass in evaluation mode without gradients; the model is left as it was found.

    The pass runs on fake tensors, which have shapes and no values, so it costs neither memory nor arithmetic; models
    that fake tensors cannot follow run for real.

    Args:
        model: the model; may live on the meta device.
        example: images (B, C, H, W); None makes them from the model's own configuration.
        extend: paths of modules that are run once more, alone, on the tokens they were given and one further token: a
            relative position bias, rotary angles or windows fix the number of tokens.

    Returns:
        The trace; `watched` is False when no example could be made or none of the passes succeeded.
    """
    if example is None:
        example = example_of(model)
        if example is None:
            return Trace(reason="the model does not say which images it takes")
    real = first_parameter(model)
    device = real.device if real is not None else torch.device("cpu")
    if real is not None and real.is_floating_point():
        example = example.to(real.dtype)
    reason = ""
    for run in (_run_fake, _run_real):
        try:
            return _watch(model, lambda run=run: run(model, example, device), extend, len(example))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001  # third-party forward code may raise anything; try the next way
            reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return Trace(reason=reason)


def first_parameter(model: nn.Module) -> Tensor | None:
    """The first parameter, or None."""
    return next(iter(model.parameters()), None)


def example_of(model: nn.Module) -> Tensor | None:
    """Zero images (1, C, H, W) of the size that the model declares, on the CPU; None when it declares none.

    The size comes from the patch embedding, then from timm's configuration; the channels from the first convolution.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    declared = config.get("input_size") if isinstance(config, Mapping) else None
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    if isinstance(size, int):
        size = (size, size)
    if size is None and declared is not None:
        size = tuple(declared)[-2:]
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if size is None and convolution is not None:
        size = (64, 64)
    if size is None:
        return None
    channels = 3 if declared is None else int(declared[0])
    if convolution is not None:
        channels = convolution.in_channels
    return torch.zeros(1, channels, *(int(s) for s in size))


@contextmanager
def frozen_run(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the body; every module's mode and the random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Touch(TorchFunctionMode):
    """Notes which parameters are arguments of tensor operations."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters = parameters
        self.touched: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the arguments, then do what was asked."""
        kwargs = kwargs or {}
        getter = getattr(func, "__name__", "") == "__get__"
        if not (getter and getattr(getattr(func, "__self__", None), "__name__", "") in _METADATA):
            self._note(args)
            self._note(kwargs.values())
        return func(*args, **kwargs)

    def _note(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self.parameters:
                    self.touched.add(id(value))
            elif isinstance(value, list | tuple):
                self._note(value)


def _watch(model: nn.Module, run: Callable[[], Any], extend: Collection[str], batch: int) -> Trace:
    seen = Trace(watched=True)
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.called[name] = seen.called.get(name, 0) + 1
            if isinstance(output, Tensor):
                seen.outputs[name] = tuple(output.shape)

        return hook

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[name] = args, kwargs

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    handles += [model.get_submodule(n).register_forward_pre_hook(keep(n), with_kwargs=True) for n in extend]
    touch = _Touch({id(p) for p in model.parameters()})
    try:
        with frozen_run(model), touch:
            run()
    finally:
        for handle in handles:
            handle.remove()
    seen.touched = touch.touched
    with frozen_run(model), _unlogged():
        for name, (args, kwargs) in given.items():
            if _takes_one_more(model.get_submodule(name), args, kwargs, batch):
                seen.extended.add(name)
    return seen


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without torch's printed tracebacks of operations that fake tensors refuse: being refused is an answer here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _takes_one_more(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> bool:
    """Whether a module that maps tokens (B, N, C) gives back (B, N + 1, C) for one token more."""
    if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3 or len(args[0]) != batch:
        return False
    longer = torch.cat((args[0], args[0][:, -1:]), 1)
    try:
        y = module(longer, *args[1:], **kwargs)
    except Exception:  # noqa: BLE001  # third-party forward code may raise anything at a length it was not made for
        return False
    return isinstance(y, Tensor) and y.shape == longer.shape


def _run_fake(model: nn.Module, example: Tensor, device: torch.device) -> Any:
    if device.type == "meta":
        return _call(model, example.to(device))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return _call(model, mode.from_tensor(example.to(device)))


def _run_real(model: nn.Module, example: Tensor, device: torch.device) -> Any:
    return _call(model, example.to(device))


def _call(model: nn.Module, example: Tensor) -> Any:
    args, kwargs = example_call(model, example)
    return model(*args, **kwargs)
