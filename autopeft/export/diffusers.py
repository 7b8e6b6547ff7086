"""A merged denoiser in its pipeline, that diffusers loads by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.errors import ExportError
from autopeft.export._card import card
from autopeft.export._denoiser import component_of, not_diffusers, write_denoiser, write_pipeline
from autopeft.export._model import not_mergeable
from autopeft.store.atomic import write_text

__all__ = ["DiffusersExport"]

_LOAD = """```python
from diffusers import {kind}

model = {kind}.from_pretrained("FOLDER/{component}").eval()
```

Where the folder holds a `model_index.json`, `diffusers.DiffusionPipeline.from_pretrained("FOLDER")` loads the whole
pipeline."""


@dataclass(frozen=True, slots=True)
class DiffusersExport:
    """`unet/` or `transformer/` with every adapter merged, and the rest of the pipeline as it was."""

    def supports(self, inserted: Inserted) -> str:
        """Every option must be mergeable, and the model one of diffusers."""
        if reason := not_diffusers(inserted.model):
            return reason
        if reason := not_mergeable(inserted):
            return f"options that cannot be merged into the model's own tensors: {reason}"
        return ""

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the folder.

        Raises:
            ExportError: when the plan cannot be represented.
        """
        if reason := self.supports(inserted):
            raise ExportError(f"the plan cannot be exported as diffusers: {reason}")
        component = component_of(inserted.model)
        paths = (
            *write_denoiser(inserted.model, inserted.merged_state(), folder / component),
            *write_pipeline(component, record, folder),
        )
        load = _LOAD.format(kind=type(inserted.model).__name__, component=component)
        title = f"{type(inserted.model).__name__}, fine-tuned with autopeft"
        readme = folder / "README.md"
        text = card(title, inserted, record, library="diffusers", sections=[("Load", load)], adapter=False)
        write_text(readme, text)
        return (*paths, readme)
