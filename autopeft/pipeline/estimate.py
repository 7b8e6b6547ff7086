"""What a search would do, without doing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autopeft.pipeline.contenders import contender_groups
from autopeft.pipeline.effort import plan_effort
from autopeft.pipeline.prepare import prepare

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["estimate", "show_estimate"]


def estimate(study: Study) -> dict[str, Any]:
    """Load the model and the data, score, plan and time a few steps; nothing is written.

    Returns:
        Budget, options, contenders, epochs and predicted seconds.
    """
    from autopeft.config.spaces import load_space
    from autopeft.pipeline.knobs import relevant_space

    prepared = prepare(study)
    groups = contender_groups(prepared, study)
    default = groups[-1].candidates[0].allocation
    effort = plan_effort(prepared, study, groups, sum(prepared.seconds.values()))
    return {
        "schema": "autopeft.estimate/1",
        "model": prepared.loaded.name,
        "base_parameters": prepared.catalog.n_base,
        "head_parameters": prepared.catalog.n_head,
        "budget": {"unit": prepared.budget.unit, "limit": prepared.budget.limit},
        "data": {"classes": len(prepared.task.classes), "sizes": dict(prepared.task.sizes)},
        "default_plan": {"options": len(default), "spent": default.spent},
        "contenders": {group.name: [c.name for c in group.candidates] for group in groups},
        "knobs": [knob.path for knob in relevant_space(load_space(study.search.space), study)],
        "trials": study.search.trials,
        "epochs": effort.epochs,
        "seconds": round(effort.planned_seconds, 1),
        "device": str(prepared.device),
        "threads": prepared.threads,
    }


def show_estimate(found: Mapping[str, Any], *, as_json: bool) -> str:
    """The estimate as JSON or as lines for a person."""
    if as_json:
        return json.dumps(found)
    budget, data = found["budget"], found["data"]
    seconds = f"{found['seconds']:.0f} s predicted" if found["seconds"] else "not predicted without --time-limit"
    lines = [
        f"model       {found['model']}: {found['base_parameters']:,} parameters, head {found['head_parameters']:,}",
        f"data        {data['classes']} classes, " + ", ".join(f"{k} {v:,}" for k, v in data["sizes"].items()),
        f"budget      {budget['limit']:,} {budget['unit']}; the default plan spends {found['default_plan']['spent']:,}",
        f"contenders  {', '.join(found['contenders'])}",
        f"search      {found['trials']} trials over {len(found['knobs'])} knobs, {found['epochs']} epochs in full",
        f"time        {seconds} on {found['device']} with {found['threads']} thread(s)",
        "nothing was written",
    ]
    return "\n".join(lines)
