"""A finished run folder to a result file without paths of the machine.

python studies/real_models/collect.py RUN RESULT.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from autopeft.core.codec import decode
from autopeft.core.record import Record
from autopeft.pipeline.summary import record_to_json
from autopeft.report.verdict import verdict
from autopeft.store.atomic import read_json, write_json


def main(run: Path, output: Path) -> None:
    record = decode(Record, read_json(run / "record.json"))
    summary = record_to_json(record, Path(run.name))
    keep = ("name", "n_base", "n_head", "fingerprint")
    trials = [
        {"name": t.name, "role": t.role, "status": t.outcome.status, "spent": t.spent, "rewards": list(t.rewards)}
        for t in record.trials
    ]
    result = {
        "verdict": verdict(record).headline,
        "model": {key: record.model[key] for key in keep},
        "data": {"classes": len(record.data["classes"]), "sizes": record.data["sizes"]},
        "environment": dict(record.environment),
        **summary,
        "trials_in_order": trials,
    }
    write_json(output, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
