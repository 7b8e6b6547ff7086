"""A forward pass as a list of operations: captured by torch.export, or watched through hooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from autopeft.models._denoiser import example_call
from autopeft.models._trace import first_parameter, frozen_run

__all__ = ["Operation", "capture_by_export", "capture_by_hooks"]

_REPEATED = re.compile(r"@\d+$")
"""torch.export marks the second call of a module `name@1`."""

_PRODUCTS = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a forward pass, or one of its inputs.

    Attributes:
        inputs: positions of the steps whose results it takes.
        modules: dotted paths of the modules it runs in, outermost first.
        parameter: name of the parameter, for a step that is one.
        is_input: whether it is the model's input.
        is_product: whether it multiplies elementwise.
    """

    inputs: tuple[int, ...]
    modules: tuple[str, ...] = ()
    parameter: str = ""
    is_input: bool = False
    is_product: bool = False


def capture_by_export(model: nn.Module, example: Tensor) -> list[Operation]:
    """The operations that torch.export sees; raises what torch.export raises."""
    args, kwargs = example_call(model, _near(model, example))
    with frozen_run(model):
        program = torch.export.export(model, args, kwargs)
    parameters = {**program.graph_signature.inputs_to_parameters}
    user_inputs = set(program.graph_signature.user_inputs)
    position: dict[Any, int] = {}
    operations: list[Operation] = []
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        position[node] = len(operations)
        operations.append(
            Operation(
                inputs=tuple(position[other] for other in node.all_input_nodes),
                modules=tuple(_REPEATED.sub("", path) for path, _ in stack.values()),
                parameter=parameters.get(node.name, "") if node.op == "placeholder" else "",
                is_input=node.op == "placeholder" and node.name in user_inputs,
                is_product=node.op == "call_function" and _base_name(node.target) in _PRODUCTS,
            )
        )
    return operations


def capture_by_hooks(model: nn.Module, example: Tensor) -> list[Operation]:
    """The operations that a forward pass calls, watched through hooks and a function mode.

    Coarser than torch.export (one step per call from Python), and blind to tensors that travel outside of torch, but
    it follows every model that runs.
    """
    example = _near(model, example)
    if not example.is_meta:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                return _record(model, mode.from_tensor(example))
        except Exception:  # noqa: BLE001  # code that depends on values cannot run on fake tensors; run it for real
            pass
    return _record(model, example)


def _record(model: nn.Module, example: Tensor) -> list[Operation]:
    tape = _Tape({id(parameter): name for name, parameter in model.named_parameters()})
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(tape.enter(path)))
        handles.append(module.register_forward_hook(tape.leave(), always_call=True))
    args, kwargs = example_call(model, example)
    tape.start([*args, *_tensors(kwargs.values())])
    try:
        with frozen_run(model), tape:
            tape.finish(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return tape.operations


def _near(model: nn.Module, example: Tensor) -> Tensor:
    parameter = first_parameter(model)
    return example if parameter is None else example.to(parameter.device)


def _base_name(target: Any) -> str:
    """`mul` of the operator `aten.mul.Tensor` and of the function `torch.mul`."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", "")).rpartition(".")[2]


class _Tape(TorchFunctionMode):
    """Writes down each call that takes or gives tensors."""

    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()
        self.parameters = parameters
        self.operations: list[Operation] = []
        self.stack: list[str] = []
        self.position: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def start(self, inputs: Iterable[Tensor]) -> None:
        self._write(Operation((), is_input=True), inputs)

    def finish(self, output: Any) -> None:
        self._write(Operation(self._inputs([output])), [])

    def enter(self, path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.stack.append(path)

        return hook

    def leave(self) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call and write it down when it gives tensors or changes its first argument."""
        kwargs = kwargs or {}
        inputs = self._inputs([args, list(kwargs.values())])
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        outputs = list(_tensors([result]))
        if name == "__setitem__":
            outputs = [args[0]]
        if outputs:
            self._write(Operation(inputs, tuple(self.stack), is_product=name in _PRODUCTS), outputs)
        return result

    def _inputs(self, values: Iterable[Any]) -> tuple[int, ...]:
        found = []
        for tensor in _tensors(values):
            if id(tensor) not in self.position and id(tensor) in self.parameters:
                self._write(Operation((), parameter=self.parameters[id(tensor)]), [tensor])
            if id(tensor) in self.position:
                found.append(self.position[id(tensor)])
        return tuple(dict.fromkeys(found))

    def _write(self, operation: Operation, outputs: Iterable[Tensor]) -> None:
        for tensor in outputs:
            self.position[id(tensor)] = len(self.operations)
            # An identity says nothing once its tensor is gone.
            self.alive.append(tensor)
        self.operations.append(operation)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
