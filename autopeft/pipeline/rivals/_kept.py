"""Plans that a contender has searched for, kept in the run folder so that a continued run does not search again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autopeft.core.allocation import Allocation
from autopeft.errors import AutopeftError
from autopeft.pipeline.planfile import read_plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.store.atomic import read_json, write_json

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["searched"]


def searched(
    name: str, prepared: Prepared, study: Study, search: Callable[[], tuple[Allocation, int]]
) -> tuple[Allocation, int]:
    """What `search` returns (a plan, and the samples that it has seen), from the run folder when it is there."""
    if prepared.folder is None:
        return search()
    folder = prepared.folder.parent / "contenders" / name
    plan, cost = folder / "plan.json", folder / "cost.json"
    if plan.is_file() and cost.is_file():
        try:
            known = read_plan(plan)
            if (known.fingerprint, known.data_hash) == (prepared.catalog.fingerprint, prepared.task.data_hash):
                return known.allocation, int(read_json(cost)["sample_epochs"])
        except (AutopeftError, KeyError, TypeError, ValueError):
            pass  # A damaged file is searched for again.
    found, seen = search()
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(as_plan(prepared, study, found), plan)
    write_json(cost, {"sample_epochs": seen})
    return found, seen
