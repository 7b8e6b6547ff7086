"""The JSON object that `search --json` ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autopeft.core.codec import encode
from autopeft.core.record import Contender, Record

__all__ = ["record_to_json"]


def record_to_json(record: Record, run: Path) -> dict[str, Any]:
    """`{"schema", "run", "best", "baselines", "exports", ...}`: the verdict without the trials."""
    winner, *others = record.contenders if record.contenders else (None,)
    return {
        "schema": Record.SCHEMA,
        "run": str(run),
        "budget": encode(record.budget),
        "best": _contender(winner) if winner is not None else None,
        "baselines": [_contender(c) for c in others],
        "trials": {
            status: sum(t.outcome.status == status for t in record.trials) for status in ("done", "pruned", "failed")
        },
        "exports": [{"kind": kind, "path": str(run / path)} for kind, path in record.exports.items()],
        "costs": encode(record.costs),
        "seconds": encode(record.seconds),
    }


def _contender(contender: Contender | None) -> dict[str, Any]:
    assert contender is not None
    done = [o for o in contender.outcomes if o.status == "done"]
    names = sorted({name for o in done for name in o.metrics})
    return {
        "name": contender.name,
        "trial": contender.trial,
        "role": contender.role,
        "spent": contender.spent,
        "seeds": len(done),
        "metrics": {name: sum(o.metrics[name] for o in done) / len(done) for name in names},
        "gain": contender.gain,
        "interval": list(contender.interval),
    }
