"""Every built-in method keeps the laws, and every law has a method that breaks it."""

from __future__ import annotations

import importlib

import pytest
import torch

from autopeft.core.contracts import Method
from autopeft.methods import BUILTIN
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.shared_core import SharedCore
from autopeft.methods.sparse import Sparse
from autopeft.testing.method_laws import BROKEN, MethodLaws

LAWS = sorted(name for name in dir(MethodLaws) if name.startswith("test_"))
METHODS: dict[str, Method] = {
    "sparse_bias": Sparse(slot="bias"),
    "lora_alpha_4": LoRA(alpha=4.0),
    "core_gradient": Core("gradient"),
    "core_rectangle": Core(shape="rectangle"),
}
_SETTINGS: dict[str, Method] = {
    "core_trajectory_blocks": Core("trajectory", "blocks", block=2),
    "core_random_diagonal": Core("random", "diagonal"),
    "shared_core_scaled": SharedCore(scales=True),
}
"""Further settings of methods that are tried in full above: one model and precision is enough."""
METHODS |= _SETTINGS
for key, target in BUILTIN.items():
    module, _, name = target.partition(":")
    METHODS[key] = getattr(importlib.import_module(module), name)()

_NEAR = frozenset({"bit_adaptformer", "bit_lora", "vpt", "vpt_shallow"})
"""Methods that document another start than the pre-trained model itself."""


def laws_of(method: Method, key: str = "", *, small: bool = False) -> MethodLaws:
    class Laws(MethodLaws):
        identity = key not in _NEAR
        models = ("vit",) if small or method.family == "tokens" else ("vit", "convnet")
        dtypes = (torch.float32,) if small else (torch.float32, torch.float64)

        def make(self) -> Method:
            return method

    return Laws()


@pytest.mark.parametrize("key", sorted(METHODS))
@pytest.mark.parametrize("law", LAWS)
def test_built_in_keeps(key: str, law: str) -> None:
    getattr(laws_of(METHODS[key], key, small=key in _SETTINGS), law)()


def test_every_law_has_a_method_that_breaks_it() -> None:
    assert sorted(BROKEN) == LAWS


@pytest.mark.parametrize("broken", LAWS)
def test_broken_method_fails_its_law_and_no_other(broken: str) -> None:
    laws = laws_of(BROKEN[broken](), small=True)
    failed = []
    for law in LAWS:
        try:
            getattr(laws, law)()
        except AssertionError:
            failed.append(law)
    assert failed == [broken]
