"""Starts of PEFT's LoRA that look at the training data."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Inserted, Task
from autopeft.errors import UsageError
from autopeft.methods._peft_layer import nested_settings
from autopeft.methods.peft_adapter import PeftAdapter

__all__ = ["start_from_activations", "start_from_gradients"]

_BATCHES = 8
"""Batches of the inner split that a start looks at."""

_PASSES = 50
"""Passes over them in which EVA's components must settle."""


def start_from_activations(inserted: Inserted, adapters: Mapping[str, PeftAdapter], task: Task, seed: int) -> None:
    """EVA (Paischer et al., 2024, arXiv 2410.07170): A holds the principal directions of the host's inputs.

    Args:
        inserted: the model with adapters.
        adapters: module path to adapter.
        task: the inner split alone is looked at.
        seed: seed of the batches.

    Raises:
        UsageError: when a rank is larger than the number of inputs in a batch, so that nothing settles.
    """
    from peft import LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    ranks = {f"^{re.escape(path)}$": int(adapter.settings["r"]) for path, adapter in adapters.items()}
    settings = next(iter(adapters.values())).settings
    config = LoraConfig(
        r=max(ranks.values()),
        rank_pattern=ranks,
        target_modules="|".join(re.escape(path) for path in adapters),
        **nested_settings({key: settings[key] for key in ("init_lora_weights", "eva_config")}, ()),
    )
    batches = _batches(task, seed)
    calls = itertools.count()

    def run(model: nn.Module, batch: Any) -> None:
        if next(calls) > _PASSES * len(batches):
            raise UsageError(
                f"EVA's directions have not settled in {_PASSES} passes over {len(batches)} batches; its ranks (up to "
                f"{config.r}) must be well below the number of tokens in a batch"
            )
        task.loss(model, batch)

    # PEFT prints where it skips a batch.
    with _still(inserted) as model, contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, Tensor] = get_eva_state_dict(
            model,
            batches,
            config,
            forward_fn=run,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=_rows,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    for path, adapter in adapters.items():
        adapter.restart(found[path], None)


def start_from_gradients(inserted: Inserted, adapters: Mapping[str, PeftAdapter], task: Task, seed: int) -> None:
    """LoRA-GA (Wang et al., 2024, arXiv 2407.05000): both factors are directions of the first gradient.

    Args:
        inserted: the model with adapters.
        adapters: module path to adapter.
        task: the inner split alone is looked at.
        seed: seed of the batches and of the randomised decompositions.
    """
    from peft import LoraConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    settings = next(iter(adapters.values())).settings
    config = LoraConfig(
        target_modules="|".join(re.escape(path) for path in adapters),
        **nested_settings({key: settings[key] for key in ("init_lora_weights", "lora_ga_config")}, ()),
    )
    batches = _batches(task, seed)
    with _still(inserted) as model:
        hosts = {path: model.get_submodule(path) for path in adapters}
        marks = {path: host._is_full_backward_hook for path, host in hosts.items()}
        flags = [(p, p.requires_grad) for p in model.parameters()]

        def run() -> None:
            # PEFT turns training mode on, and BatchNorm would follow the data.
            for module in model.modules():
                module.training = False
            for batch in batches:
                torch.autograd.backward(task.loss(model, batch))

        try:
            # The first layers' inputs need no gradient, of which torch warns whoever counts backward passes.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                preprocess_loraga(model, config, run)
            gradients = {path: host.__dict__["_peft_loraga_grad"] for path, host in hosts.items()}
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for path, host in hosts.items():
                host.__dict__.pop("_peft_loraga_grad", None)
                host.__dict__.pop("_peft_loraga_grad_count", None)
                host._is_full_backward_hook = marks[path]
    for i, (path, adapter) in enumerate(adapters.items()):
        adapter.restart_from_gradient(gradients[path], seed + i)


def _batches(task: Task, seed: int) -> list[Any]:
    return list(itertools.islice(task.batches("inner", seed), _BATCHES))


def _rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Every token is a row."""
    x: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return x.reshape(-1, x.shape[-1])


@contextlib.contextmanager
def _still(inserted: Inserted) -> Iterator[nn.Module]:
    """The plain model in evaluation mode; every module's mode is put back."""
    modes = [(module, module.training) for module in inserted.model.modules()]
    with inserted.plain() as model:
        also = [(module, module.training) for module in model.modules()]
        for module in model.modules():
            module.training = False
        try:
            yield model
        finally:
            for module, mode in (*also, *modes):
                module.training = mode
