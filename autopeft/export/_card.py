"""Model cards: the README.md beside every export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from autopeft.core.contracts import Inserted
from autopeft.core.outcome import Outcome
from autopeft.core.record import Record
from autopeft.export._denoiser import not_diffusers
from autopeft.export._model import pretrained_config

__all__ = ["base_call", "card", "hub_id"]

_ROWS = 40


def card(
    title: str, inserted: Inserted, record: Record, *, library: str, sections: Sequence[tuple[str, str]], adapter: bool
) -> str:
    """The text of README.md: what it is, how it is loaded, what was trained, what it reached.

    Args:
        title: what the folder holds.
        inserted: the plan.
        record: where it came from.
        library: which library loads it.
        sections: heading and text of what is special to the format.
        adapter: whether the folder holds a change of a base model and not a whole model.
    """
    made, task = (
        ("timm", "image-classification") if not_diffusers(inserted.model) else ("diffusers", "image-generation")
    )
    front: dict[str, Any] = {"library_name": library}
    if made == "timm":
        front["pipeline_tag"] = task
    front["tags"] = ["autopeft", made, task, *sorted({o.method for o in inserted.allocation})]
    if base := hub_id(record):
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    licence = pretrained_config(inserted.model).get("license")
    if licence and record.model.get("pretrained_tag"):
        front["license"] = str(licence)
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---", f"# {title}", _facts(inserted, record)]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections]
    parts += [_plan(inserted), _results(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_id(record: Record) -> str:
    """Where the base weights can be fetched by name; empty when they cannot."""
    spec = str(record.model.get("spec") or record.model.get("name") or "")
    if spec.startswith("hf-hub:"):
        return spec.removeprefix("hf-hub:")
    tag = record.model.get("pretrained_tag")
    if not tag or ":" in spec:
        return ""
    return f"timm/{record.model.get('architecture')}.{tag}"


def base_call(record: Record, classes: int, folder: str = "") -> str:
    """The Python expression that builds the base model with its pre-trained weights.

    Args:
        record: the run.
        classes: outputs of the classifier.
        folder: a timm folder of the base, for a base that cannot be fetched by name.
    """
    if folder:
        return f'timm.create_model("local-dir:{folder}", pretrained=True)'
    spec = str(record.model.get("spec") or record.model.get("name") or "")
    name = spec if ":" in spec else f"{record.model.get('architecture')}.{record.model.get('pretrained_tag')}"
    arguments = {k: v for k, v in record.model.get("model_args", {}).items() if k != "num_classes"}
    listed = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{name}", pretrained=True, num_classes={classes}{listed})'


def _facts(inserted: Inserted, record: Record) -> str:
    model, data, allocation = record.model, record.data, inserted.allocation
    lines = [f"- base model: `{model.get('name', '?')}` (architecture `{model.get('architecture', '?')}`)"]
    if model.get("weights_hash"):
        lines.append(f"- SHA-256 of the base weights without the classifier: `{model['weights_hash']}`")
    classes = ", ".join(map(str, list(data.get("classes", ()))[:20]))
    more = ", ..." if len(data.get("classes", ())) > 20 else ""
    lines.append(f"- data: `{data.get('spec', '?')}`, classes: {classes}{more}")
    if data.get("data_hash"):
        lines.append(f"- hash of data and splits: `{data['data_hash']}`")
    lines.append(f"- budget: {allocation.budget}; spent {allocation.spent:,}, the classifier not counted")
    config = model.get("data_config") or {}
    if config:
        wanted = ("input_size", "interpolation", "crop_pct", "mean", "std")
        lines.append("- input: " + ", ".join(f"{key} {config[key]}" for key in wanted if key in config))
    return "\n".join(lines)


def _plan(inserted: Inserted) -> str:
    options = inserted.allocation.options
    if not options:
        return "## Plan\n\nOnly the classifier was trained."
    rows = [f"| `{o.site}` | {o.method} | {o.size:,} | {o.cost.trainable:,} |" for o in options[:_ROWS]]
    more = f"\n\nand {len(options) - _ROWS} more." if len(options) > _ROWS else ""
    head = "| site | method | size | trainable parameters |\n| :--- | :--- | ---: | ---: |\n"
    return "## Plan\n\n" + head + "\n".join(rows) + more


def _results(record: Record) -> str:
    if not record.contenders:
        return ""
    lines = ["## Results", ""]
    for contender in record.contenders:
        done = [o for o in contender.outcomes if o.status == "done"]
        if done:
            lines.append(f"- {contender.name}: {_means(done)} ({done[0].split} split, {len(done)} seeds)")
    return "\n".join(lines)


def _means(done: Sequence[Outcome]) -> str:
    names = [name for name in done[0].metrics if all(name in o.metrics for o in done)]
    return ", ".join(f"{name} {sum(o.metrics[name] for o in done) / len(done):.4f}" for name in names)
