"""Trials of the record to attributes of Optuna's trials, and back."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from autopeft.core.codec import decode, encode
from autopeft.core.outcome import Outcome, Status
from autopeft.core.record import Trial
from autopeft.errors import CorruptFile
from autopeft.search.history import role_of

__all__ = ["as_trial", "attributes"]

_log = logging.getLogger(__name__)

_RECORD = "record"

_STATUS: dict[TrialState, Status] = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def attributes(trial: Trial) -> dict[str, Any]:
    """What the dashboard shows of a trial, and the whole of it as JSON under `record`."""
    return {
        "name": trial.name,
        "role": trial.role,
        "plan": trial.digest,
        "spent": trial.spent,
        "mix": ", ".join(f"{method} {n:,}" for method, n in sorted(trial.mix.items(), key=lambda item: -item[1])),
        "trainable": trial.outcome.trainable,
        "seconds": round(trial.outcome.seconds, 3),
        "fidelity": trial.fidelity,
        _RECORD: json.dumps(encode(trial)),
    }


def as_trial(frozen: FrozenTrial) -> Trial:
    """The trial of the record behind a finished trial of the study.

    One without a record (told before it was described, or put there by somebody else) gets what the study knows of it.
    """
    text = frozen.user_attrs.get(_RECORD)
    if isinstance(text, str):
        try:
            kept = decode(Trial, json.loads(text), f"trial {frozen.number}")
            return dataclasses.replace(kept, number=frozen.number)
        except (CorruptFile, ValueError) as error:
            _log.warning("the record of trial %d cannot be read: %s", frozen.number, error)
    status = _STATUS[frozen.state]
    reason = str(frozen.user_attrs.get("reason", "")) or ("" if status == "done" else f"{status}, no reason is known")
    values = tuple(frozen.values or ())
    seconds = frozen.duration.total_seconds() if frozen.duration is not None else 0.0
    outcome = Outcome(
        status,
        metrics={("value" if not i else f"value {i}"): v for i, v in enumerate(values)} if status == "done" else {},
        curve=tuple(sorted(frozen.intermediate_values.items())),
        seconds=seconds,
        reason=reason,
    )
    return Trial(
        frozen.number,
        str(frozen.user_attrs.get("name", f"trial {frozen.number}")),
        role_of(frozen),
        dict(frozen.params),
        str(frozen.user_attrs.get("plan", "")),
        0,
        {},
        outcome,
        values if status == "done" else (),
    )
