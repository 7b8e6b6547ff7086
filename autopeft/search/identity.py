"""Which study a storage holds: two processes may share it only when they mean the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optuna.study import Study

from autopeft.errors import CorruptFile, StaleRun

__all__ = ["claim", "differences", "read_attribute", "write_attribute"]

_MOST_SHOWN = 3
_PREFIX = "autopeft:"


def claim(study: Study, identity: Mapping[str, Any]) -> None:
    """Write the identity into a new study, or refuse a study that has another one.

    Args:
        study: the study.
        identity: plain data: everything that must be equal for trials to compare.

    Raises:
        StaleRun: naming what differs.
    """
    if read_attribute(study, "identity") is None:
        if study.get_trials(deepcopy=False):
            raise StaleRun(
                f"the study {study.study_name!r} has trials that autopeft did not make; choose another --study"
            )
        write_attribute(study, "identity", identity)
    # Read back also after writing: another process may have written its own in the same moment.
    found = differences(read_attribute(study, "identity"), json.loads(json.dumps(identity)))
    if found:
        shown = "; ".join(f"{path} was {old!r} and is {new!r} now" for path, old, new in found[:_MOST_SHOWN])
        more = f", and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
        raise StaleRun(
            f"the study {study.study_name!r} was begun with other settings: {shown}{more}. Choose another --study or "
            "--output, or give the same settings to continue"
        )


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted path, old value and new value of every leaf that differs in plain data, in alphabetical order."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [(path, old, new)]


def write_attribute(study: Study, name: str, value: Any) -> None:
    """Keep plain data in the study, as JSON text: the dashboard cuts objects, and leaves texts whole."""
    study.set_user_attr(_PREFIX + name, json.dumps(value, sort_keys=True))


def read_attribute(study: Study, name: str) -> Any:
    """What `write_attribute` kept; None when there is nothing.

    Raises:
        CorruptFile: when it is not JSON.
    """
    text = study.user_attrs.get(_PREFIX + name)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise CorruptFile(f"the attribute {name!r} of the study {study.study_name!r} is not JSON: {error}") from error
