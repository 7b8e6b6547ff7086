"""The merged model as ONNX, for runtimes without Python."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.errors import ExportError, MissingDependency, UsageError
from autopeft.export._model import not_mergeable, not_timm
from autopeft.export._timm_folder import class_names, rebuild
from autopeft.store.atomic import replacing, write_json, write_text

__all__ = ["OnnxExport"]

_NEEDED = ("onnx", "onnxscript")


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """`model.onnx` with input `image` (batch, channels, height, width) and output `logits`, any batch size.

    Beside it `preprocess.json` (size, interpolation, crop, mean, std) and `labels.txt` (one class per line).

    Attributes:
        max_batch: largest batch the graph promises to take.
    """

    max_batch: int = 1024

    def __post_init__(self) -> None:
        if self.max_batch < 2:
            raise UsageError(f"onnx: max_batch must be at least 2, got {self.max_batch}")

    def supports(self, inserted: Inserted) -> str:
        """Every option must be mergeable, and timm must know the architecture."""
        if reason := not_mergeable(inserted):
            return f"options that cannot be merged into the model's own tensors: {reason}"
        return not_timm(inserted.model)

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the folder.

        Raises:
            MissingDependency: when onnx or onnxscript is not installed.
            ExportError: when an option cannot be merged or the model cannot be traced.
        """
        for package in _NEEDED:
            if importlib.util.find_spec(package) is None:
                raise MissingDependency(package, "onnx", "export a model as ONNX")
        model = rebuild(inserted.model, inserted.merged_state(), record, exportable=True)
        config = record.model.get("data_config", {})
        size = tuple(config.get("input_size", (3, 224, 224)))
        paths = [folder / name for name in ("model.onnx", "preprocess.json", "labels.txt")]
        with replacing(paths[0]) as temporary:
            self._trace(model, torch.zeros(2, *size), temporary)
        write_json(paths[1], {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()})
        write_text(paths[2], "".join(f"{name}\n" for name in class_names(record, inserted.model)))
        return tuple(paths)

    def _trace(self, model: nn.Module, example: torch.Tensor, path: Path) -> None:
        batch = torch.export.Dim("batch", min=1, max=self.max_batch)
        with _silent():
            try:
                torch.onnx.export(
                    model,
                    (example,),
                    str(path),
                    dynamo=True,
                    input_names=["image"],
                    output_names=["logits"],
                    dynamic_shapes=({0: batch},),
                    external_data=False,
                    verbose=False,
                )
            except torch.onnx.errors.OnnxExporterError as error:
                reason = str(error).strip().splitlines()[0]
                raise ExportError(f"{type(model).__name__} cannot be exported as ONNX: {reason}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter warns about torch's own deprecations and narrates; what fails is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
