"""LoRA as diffusers' pipelines load it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.errors import ExportError
from autopeft.export._card import card
from autopeft.export._denoiser import component_of, not_diffusers
from autopeft.export._files import write_tensors
from autopeft.export._low_rank import gather_factors, not_low_rank
from autopeft.export._model import adapters_of, classifier_modules
from autopeft.store.atomic import write_text

__all__ = ["DiffusersLoRAExport"]

_METADATA = "lora_adapter_metadata"
"""Key of the file's header that diffusers reads the configuration from."""

_LOAD = """```python
pipeline.load_lora_weights("FOLDER")
```

or, on the model alone, `model.load_lora_adapter("FOLDER", prefix="{component}")`. The configuration in the file's
header holds the rank of every layer; alpha equals it everywhere, so that every scale is 1."""


@dataclass(frozen=True, slots=True)
class DiffusersLoRAExport:
    """`pytorch_lora_weights.safetensors` with one rank per layer, and `README.md`."""

    def supports(self, inserted: Inserted) -> str:
        """Every option must be a low-rank change of a Linear or a convolution, and nothing else be trained."""
        if reason := not_diffusers(inserted.model):
            return reason
        if not hasattr(inserted.model, "load_lora_adapter"):
            return f"diffusers loads no LoRA into a {type(inserted.model).__name__}; export it as diffusers or peft"
        if not len(inserted.allocation):
            return "the plan has no adapters"
        if reason := not_low_rank(inserted):
            return f"a LoRA file holds low-rank changes alone, not {reason}"
        if heads := classifier_modules(inserted):
            return f"a LoRA file cannot hold the trained table of labels {', '.join(heads)}; export it as diffusers"
        return ""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the folder.

        Raises:
            ExportError: when the plan cannot be represented.
        """
        if reason := self.supports(inserted):
            raise ExportError(f"the plan cannot be exported as diffusers-lora: {reason}")
        component, tensors = component_of(inserted.model), {}
        layers = gather_factors(inserted, adapters_of(inserted).values())
        for layer in layers:
            kernel = (1,) * (len(layer.shape) - 2)
            name = f"{component}.{layer.module}"
            tensors[f"{name}.lora_A.weight"] = layer.down.view(layer.rank, *layer.shape[1:])
            tensors[f"{name}.lora_B.weight"] = layer.up.view(layer.shape[0], layer.rank, *kernel)
        ranks = {f"^{re.escape(layer.module)}$": layer.rank for layer in layers}
        config = {
            "r": max(ranks.values()),
            "lora_alpha": max(ranks.values()),
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "target_modules": "|".join(re.escape(layer.module) for layer in layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
        }
        header = {_METADATA: json.dumps({f"{component}.{k}": v for k, v in config.items()}, indent=2, sort_keys=True)}
        path = write_tensors(folder / "pytorch_lora_weights.safetensors", tensors, header)
        title = f"LoRA for {type(inserted.model).__name__}, planned by autopeft"
        load = _LOAD.format(component=component)
        readme = folder / "README.md"
        text = card(title, inserted, record, library="diffusers", sections=[("Load", load)], adapter=True)
        write_text(readme, text)
        return path, readme
