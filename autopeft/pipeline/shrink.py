"""The steps of a compression, each measured on what its file gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autopeft.compression.dare import Dropped, dense_change, drop_change
from autopeft.compression.file import contents, quantise_parts, read_parts
from autopeft.compression.inputs import contributions, droppable
from autopeft.compression.loader import patched
from autopeft.compression.quantise import Quantised
from autopeft.compression.record import Step
from autopeft.compression.rescale import Rescaling, choose_rescaling
from autopeft.compression.settings import CompressionSettings
from autopeft.errors import Diverged, ExportError, UsageError
from autopeft.export.compressed import Change, write_parts
from autopeft.pipeline.calibration import Calibration
from autopeft.pipeline.events import Emit, Event
from autopeft.training.evaluate import evaluate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.config.study import Study
    from autopeft.core.contracts import Inserted
    from autopeft.pipeline.prepare import Prepared

__all__ = ["Shrinker", "Shrunk"]

_TRAINED = "trained"


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """A compressed plan before it is written.

    Attributes:
        tensors: content of the file.
        metadata: texts of its header.
        steps: `trained` first.
        model: the model that the file gives, in evaluation mode on the study's device.
        rescaling: divisors of the kept values.
        whole: weights that were not dropped from, because their change is stored in less already.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    steps: tuple[Step, ...]
    model: nn.Module
    rescaling: Rescaling = field(default_factory=lambda: Rescaling({}))
    whole: tuple[str, ...] = ()


class Shrinker:
    """Compresses one trained plan.

    Args:
        prepared: model and task.
        study: reward and settings of the plan.
        settings: what is done.
        plain: a copy of the model without adapters; its weights are overwritten.
        metadata: texts that every file carries.
        folder: where files are tried out.
        emit: what is told.
    """

    def __init__(
        self,
        prepared: Prepared,
        study: Study,
        settings: CompressionSettings,
        plain: nn.Module,
        metadata: Mapping[str, str],
        folder: Path,
        emit: Emit,
    ) -> None:
        self._prepared, self._study, self._settings = prepared, study, settings
        self._plain, self._metadata, self._path, self._emit = plain, metadata, folder / "tried.safetensors", emit

    def change(self, change: Change) -> Shrunk:
        """Compress the change of the model's own tensors.

        Raises:
            UsageError: when the settings have no effect.
            ExportError: when the result is larger, or its loss higher than allowed.
        """
        settings = self._settings

        def load(parts: Mapping[str, Tensor]) -> nn.Module:
            self._plain.load_state_dict(patched(change.base, parts))
            return self._plain.eval()

        parts: dict[str, Tensor | Quantised] = dict(change.parts)
        tensors, texts = dict(change.parts), dict(self._metadata)
        steps = [self._step(_TRAINED, self.size_of(tensors), load(change.parts))]
        dropped: Dropped | None = None
        rescaling = Rescaling({})
        whole: tuple[str, ...] = ()
        names = iter(settings.steps)
        if settings.drop is not None:
            dropped, rescaling, whole = self._drop(change)
            parts = dict(dropped.rescaled(rescaling.q))
            tensors, texts = contents(parts, dropped, self._metadata)
            steps.append(self._tried(next(names), tensors, texts, load))
        if settings.bits is not None:
            plain = {name: part for name, part in parts.items() if not isinstance(part, Quantised)}
            head = frozenset(f"{name}.full" for name in change.classifier) if settings.head else frozenset()
            parts = quantise_parts(plain, settings.bits, settings.codes, head=head)
            self._need_codes(parts)
            tensors, texts = contents(parts, dropped, self._metadata)
            steps.append(self._tried(next(names), tensors, texts, load))
        self._judge(steps)
        return Shrunk(tensors, texts, tuple(steps), self._plain, rescaling, whole)

    def size_of(self, tensors: Mapping[str, Tensor]) -> int:
        """Bytes of a file with these tensors."""
        return write_parts(self._path, tensors, dict(self._metadata))

    def tensors(self, inserted: Inserted, reason: str) -> Shrunk:
        """Give codes to the adapters' own tensors.

        Args:
            inserted: the trained plan; it holds the compressed tensors afterwards.
            reason: why it cannot be merged, if it cannot.

        Raises:
            UsageError: when the settings have no effect.
            ExportError: when the result is larger, or its loss higher than allowed.
        """
        settings = self._settings
        if settings.drop is not None or settings.bits is None:
            raise UsageError(
                f"entries can be dropped from a change of the model's own tensors alone, and this plan is none "
                f"({reason}). Leave --drop out and give --bits: then its adapters' tensors are compressed as they are"
            )

        def load(parts: Mapping[str, Tensor]) -> nn.Module:
            inserted.load_stored(parts)
            inserted.train_mode(False)
            return inserted.model

        stored = inserted.stored()
        steps = [self._step(_TRAINED, self.size_of(stored), load(stored))]
        kinds = ("adapter/", "head/") if settings.head else ("adapter/",)
        chosen = {name: tensor for name, tensor in stored.items() if name.startswith(kinds)}
        parts = {**stored, **quantise_parts(chosen, settings.bits, settings.codes)}
        self._need_codes(parts)
        tensors, texts = contents(parts, None, self._metadata)
        steps.append(self._tried(settings.steps[0], tensors, texts, load))
        self._judge(steps)
        return Shrunk(tensors, texts, tuple(steps), inserted.model)

    def _drop(self, change: Change) -> tuple[Dropped, Rescaling, tuple[str, ...]]:
        """The change with entries dropped, the divisors, and the weights that stay whole."""
        settings, drop = self._settings, self._settings.drop
        assert drop is not None
        shapes = {name: tuple(tensor.shape) for name, tensor in change.base.items()}
        weights = droppable(self._plain, change.classifier)
        changed = {key.rpartition(".")[0] for key in change.parts}
        candidates = tuple(name for name in weights if name in changed)
        if not candidates:
            raise UsageError(
                "there is nothing to drop from: the plan changes no weight of a Linear or convolutional layer. "
                "Leave --drop out and give --bits"
            )
        first = drop_change(change.parts, shapes, candidates, drop, settings.seed, even_larger=settings.even_larger)
        if not first.kept:
            raise UsageError(
                f"dropping {drop:.4g} of the entries makes nothing smaller: all {len(candidates)} changed weights are "
                f"stored as low-rank factors, with fewer numbers than would be left. Leave --drop out and give --bits, "
                f"drop more, or say --even-larger"
            )
        whole = tuple(name for name in candidates if name not in first.kept)
        kept = tuple(first.kept)
        draws = [first]
        if settings.rescale != "dare":
            draws += [
                drop_change(change.parts, shapes, kept, drop, settings.seed + further, even_larger=True)
                for further in range(1, settings.draws)
            ]
            self._emit(Event("stage", f"choosing what kept values are divided by, on {settings.choose_on} samples"))
            calibration = Calibration(self._prepared, self._plain, change.base, change.parts, settings)
            weighed: dict[str, Tensor] = {}
            if settings.rescale == "darex-q-layer":
                means = calibration.inputs(kept, change.parts)
                weighed = {name: _weighed(change, name, shapes, mean) for name, mean in means.items()}
            rescaling = choose_rescaling(draws, settings, calibration.objective, weighed)
        else:
            rescaling = choose_rescaling(draws, settings, lambda parts: 0.0, {})
        if rescaling.plain is not None and rescaling.chosen is not None and rescaling.chosen > rescaling.plain:
            text = (
                f"by {settings.choose} on the {settings.choose_on} split, --rescale dare is better here "
                f"({rescaling.plain:.4g}) than {settings.rescale} ({rescaling.chosen:.4g})"
            )
            self._emit(Event("warning", text))
        return first, rescaling, whole

    def _tried(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        texts: Mapping[str, str],
        load: Callable[[Mapping[str, Tensor]], nn.Module],
    ) -> Step:
        """Write the file, read it back, and measure the model that it gives."""
        size = write_parts(self._path, tensors, texts)
        return self._step(name, size, load(read_parts(self._path)))

    def _step(self, name: str, size: int, model: nn.Module) -> Step:
        task, device = self._prepared.task, self._prepared.device
        try:
            metrics = dict(evaluate(model, task, "outer", device).metrics)
        except Diverged as error:
            raise ExportError(
                f"after the step {name!r} the model gives NaN or infinite outputs; drop less, or use more bits"
            ) from error
        metrics |= self._study.reward.measure(model, task, "outer")
        with torch.no_grad():
            losses = torch.cat([task.losses(model, batch).double().cpu() for batch in task.batches("outer")])
        step = Step(name, size, float(losses.mean()), metrics)
        metric = self._study.reward.names[0]
        shown = f"{metric} {metrics[metric]:.4f}" if metric in metrics else ""
        self._emit(Event("result", f"{name}: {size:,} bytes, loss {step.loss:.4f} {shown}".rstrip()))
        return step

    def _need_codes(self, parts: Mapping[str, Tensor | Quantised]) -> None:
        if not any(isinstance(part, Quantised) for part in parts.values()):
            more = "" if self._settings.head else "; --head gives the classifier codes too"
            raise UsageError(
                f"{self._settings.bits} bits per value make nothing smaller: the plan has trained a few values "
                f"beside the classifier at most{more}"
            )

    def _judge(self, steps: list[Step]) -> None:
        first, last, settings = steps[0], steps[-1], self._settings
        increase = last.loss - first.loss
        # Written so that NaN, which compares as false, is refused.
        if not increase <= settings.max_loss_increase:
            raise ExportError(
                f"refused: the loss on the outer split rises from {first.loss:.4f} to {last.loss:.4f}, by more than "
                f"{settings.max_loss_increase:g}. Drop less, use more bits, try another --rescale, or allow more with "
                f"--max-loss-increase"
            )
        if last.bytes >= first.bytes and not settings.even_larger:
            raise ExportError(
                f"refused: the result takes {last.bytes:,} bytes, what was trained {first.bytes:,}. Use fewer bits, or "
                f"say --even-larger"
            )


def _weighed(change: Change, name: str, shapes: Mapping[str, tuple[int, ...]], mean: Tensor) -> Tensor:
    """The change of a weight times its mean input; a change of the bias is one more column, as in the paper."""
    bias = name.removesuffix("weight") + "bias"
    moved = any(key.rpartition(".")[0] == bias for key in change.parts)
    return contributions(
        dense_change(change.parts, name, shapes[name]),
        mean,
        dense_change(change.parts, bias, shapes[bias]) if moved else None,
    )
