"""A merged model that timm and transformers load by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.export._card import card
from autopeft.export._model import not_mergeable, not_timm
from autopeft.export._timm_folder import write_timm_folder
from autopeft.store.atomic import write_text

__all__ = ["TimmExport"]

_LOAD = """```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

or

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
```"""


@dataclass(frozen=True, slots=True)
class TimmExport:
    """`config.json`, `model.safetensors` and `README.md`: a whole model with every adapter merged."""

    def supports(self, inserted: Inserted) -> str:
        """Every option must be mergeable, and timm must know the architecture."""
        if reason := not_mergeable(inserted):
            return f"options that cannot be merged into the model's own tensors: {reason}"
        return not_timm(inserted.model)

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the folder.

        Raises:
            ExportError: when an option cannot be merged, or classes and outputs differ in number.
        """
        paths = write_timm_folder(inserted.model, inserted.merged_state(), record, folder)
        readme = folder / "README.md"
        title = f"{record.model.get('architecture', 'model')}, fine-tuned with autopeft"
        text = card(title, inserted, record, library="timm", sections=[("Load", _LOAD)], adapter=False)
        write_text(readme, text)
        return (*paths, readme)
