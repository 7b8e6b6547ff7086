"""A PEFT folder: LoRA with one rank per layer, and the classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.errors import ExportError, UsageError
from autopeft.export._base import BaseChoice, base_expression, includes_base, write_base
from autopeft.export._card import card, hub_id
from autopeft.export._denoiser import not_diffusers
from autopeft.export._files import write_tensors
from autopeft.export._low_rank import Factors, gather_factors, not_low_rank
from autopeft.export._model import States, adapters_of, classifier_modules, not_timm, states_of, trained_statistics
from autopeft.export._peft_types import not_one_type, typed_plan
from autopeft.store.atomic import write_json, write_text

__all__ = ["PeftExport"]

_PREFIX = "base_model.model."
_BASE = "base"

_LOAD = """```python
import {library}
from peft import PeftModel

base = {base}
model = PeftModel.from_pretrained(base, "FOLDER"{trainable}){mode}
```

`AutoPeftModel` cannot load it: it knows the models of transformers alone."""


@dataclass(frozen=True, slots=True)
class PeftExport:
    """`adapter_config.json`, `adapter_model.safetensors` and `README.md`, for `peft.PeftModel.from_pretrained`.

    LoRA is written as it is. Core is exactly a LoRA of its rank: A = V^T, B = U M. Options on slices of a fused
    projection become one LoRA on the whole, whose B is zero outside of the slices' rows. The ranks differ by layer;
    `alpha_pattern` repeats them, so that every scale is 1. A plan of one other type of the method `peft` is written as
    that type, with a pattern anchored to each layer where sizes differ.

    Attributes:
        trained: False writes the start of a production training: every B is zero, so the model is the base with the
            classifier as it is now. Insert the plan without loading a trained state for the warmed-up classifier.
        uniform_rank: pad every layer with zeros to the largest rank, for programs that ignore `rank_pattern`. The
            model stays the same.
        base: whether the base model is written into `base/`.
    """

    trained: bool = True
    uniform_rank: bool = False
    base: BaseChoice = "auto"

    def __post_init__(self) -> None:
        if self.base not in get_args(BaseChoice):
            raise UsageError(f"base must be one of {', '.join(get_args(BaseChoice))}, got {self.base!r}")

    def supports(self, inserted: Inserted) -> str:
        """Every option must be a low-rank change of a Linear or an ungrouped Conv2d, or all of one type of PEFT."""
        if not len(inserted.allocation):
            return "the plan has no adapters, only the classifier is trained; export it as timm"
        if (reason := not_low_rank(inserted)) and (other := self._not_one_type(inserted)):
            return f"PEFT holds one kind of adapter, and these options cannot be written as LoRA: {reason}; {other}"
        if trained_statistics(inserted):
            return "the BatchNorm statistics were trained, which a PEFT adapter cannot hold"
        names = [name for name, _ in inserted.model.named_modules()]
        for head in classifier_modules(inserted):
            also = [name for name in names if name.endswith(head) and name != head]
            if also:
                return f"PEFT finds the classifier {head!r} by the end of its name, which {also[0]!r} shares"
        if not not_diffusers(inserted.model):
            return "" if self.trained else "an untrained start is written for models of timm alone"
        return not_timm(inserted.model)

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the folder.

        Raises:
            ExportError: when the plan cannot be represented.
        """
        if reason := self.supports(inserted):
            raise ExportError(f"the plan cannot be exported as peft: {reason}")
        states = states_of(inserted)
        if not_low_rank(inserted):
            typed = typed_plan(inserted)
            config = {**typed.config, **self._about(inserted, record), "inference_mode": True}
            kind = str(config["peft_type"])
            return self._write(kind, config, dict(typed.tensors), states, inserted, record, folder)
        layers = [self._shaped(factors) for factors in gather_factors(inserted, adapters_of(inserted).values())]
        if self.uniform_rank:
            layers = _padded(layers)
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            tensors[f"{layer.module}.lora_A.weight"] = layer.down.view(layer.rank, *layer.shape[1:])
            kernel = (1,) * (len(layer.shape) - 2)
            tensors[f"{layer.module}.lora_B.weight"] = layer.up.view(layer.shape[0], layer.rank, *kernel)
        return self._write("LoRA", self._config(layers, inserted, record), tensors, states, inserted, record, folder)

    def _not_one_type(self, inserted: Inserted) -> str:
        if not self.trained or self.uniform_rank:
            return "an untrained start and padded ranks exist for LoRA alone"
        return not_one_type(inserted)

    def _write(
        self,
        kind: str,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        states: States,
        inserted: Inserted,
        record: Record,
        folder: Path,
    ) -> tuple[Path, ...]:
        tensors |= {name: states.merged[name] for name in states.classifier}
        named = {_PREFIX + name: tensor for name, tensor in tensors.items()}
        paths = [folder / "adapter_config.json", write_tensors(folder / "adapter_model.safetensors", named)]
        write_json(paths[0], config)
        if includes_base(self.base, record):
            paths += write_base(inserted, states, record, folder / _BASE)
        load = _LOAD.format(
            library="timm" if not_diffusers(inserted.model) else "diffusers",
            base=base_expression(self.base, inserted, record),
            trainable="" if self.trained else ", is_trainable=True",
            mode=".eval()" if self.trained else "",
        )
        what = "adapter" if self.trained else "untrained start"
        title = f"{kind} {what} for {record.model.get('architecture', 'a model')}, planned by autopeft"
        paths.append(folder / "README.md")
        write_text(paths[-1], card(title, inserted, record, library="peft", sections=[("Load", load)], adapter=True))
        return tuple(paths)

    def _shaped(self, factors: Factors) -> Factors:
        if self.trained:
            return factors
        return Factors(factors.module, factors.shape, factors.down, torch.zeros_like(factors.up))

    def _config(self, layers: Sequence[Factors], inserted: Inserted, record: Record) -> dict[str, Any]:
        ranks = {f"^{re.escape(layer.module)}$": layer.rank for layer in layers}
        largest = max(ranks.values())
        return {
            "peft_type": "LORA",
            "task_type": None,
            **self._about(inserted, record),
            "revision": None,
            "inference_mode": self.trained,
            "r": largest,
            "lora_alpha": largest,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
            "target_modules": _targets([layer.module for layer in layers], inserted.model),
            "rank_pattern": {} if self.uniform_rank else ranks,
            "alpha_pattern": {} if self.uniform_rank else dict(ranks),
        }

    def _about(self, inserted: Inserted, record: Record) -> dict[str, Any]:
        """What every configuration says of the base and of the classifier."""
        return {
            "base_model_name_or_path": (_BASE if includes_base(self.base, record) else "") or _source(record),
            "auto_mapping": {
                "base_model_class": type(inserted.model).__name__,
                "parent_library": type(inserted.model).__module__,
            },
            "modules_to_save": list(classifier_modules(inserted)),
        }


def _padded(layers: Sequence[Factors]) -> list[Factors]:
    """The same changes with as many zero rows of A and columns of B as make every rank the largest."""
    largest = max(layer.rank for layer in layers)
    return [
        Factors(
            layer.module,
            layer.shape,
            torch.cat([layer.down, layer.down.new_zeros(largest - layer.rank, layer.down.shape[1])]),
            torch.cat([layer.up, layer.up.new_zeros(layer.up.shape[0], largest - layer.rank)], dim=1),
        )
        for layer in layers
    ]


def _targets(modules: Sequence[str], model: nn.Module) -> list[str] | str:
    """A list, which most programs expect; a regular expression where the list would hit other modules as well.

    PEFT compares the names of a list with the end of every module's name.
    """
    wanted = set(modules)
    others = [name for name, _ in model.named_modules() if name and name not in wanted]
    if any(other.endswith(f".{module}") for other in others for module in wanted):
        return "|".join(re.escape(module) for module in modules)
    return list(modules)


def _source(record: Record) -> str:
    return hub_id(record) or str(record.model.get("spec") or record.model.get("name") or "").removeprefix("local-dir:")
