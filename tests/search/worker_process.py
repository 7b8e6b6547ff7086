"""A search with a made-up objective, in a process of its own that a test can kill.

Arguments: URL of the storage, number of trials in all, seconds per epoch, `--baselines` to add two of them first,
`--hang=K:E` to stop for ever in the process's trial K (from 0) after epoch E. Waits for a line on standard input before
it opens the study, and prints one line per event.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

from autopeft.core.goals import Goals
from autopeft.core.outcome import Outcome
from autopeft.core.record import Trial
from autopeft.core.space import Knob, Space
from autopeft.search.optuna_study import OptunaSearcher
from autopeft.search.tpe import TPE

RATE, KIND = Knob("rate", 1e-4, 1.0, log=True), Knob("kind", choices=(1, 2, "x"))
SPACE = Space((Knob("a", 0.0, 1.0, default=0.5), RATE, KIND))
EPOCHS = 9


def say(*words: object) -> None:
    print(*words, flush=True)


def merit(values: dict[str, object], epoch: int) -> float:
    return -((float(values["a"]) - 0.3) ** 2) - 0.1 * (values["kind"] != "x") - 0.01 / epoch  # type: ignore[arg-type]


def hang(flags: list[str], trial: int, epoch: int) -> None:
    if f"--hang={trial}:{epoch}" in flags:
        say("hangs")
        time.sleep(600)


def main(url: str, total: int, pause: float, flags: list[str]) -> None:
    say("ready")
    sys.stdin.readline()
    searcher = OptunaSearcher.open(
        url,
        "kill",
        SPACE,
        seed=5,
        goals=Goals(("merit",), ("maximize",)),
        max_epochs=EPOCHS,
        sampler=TPE(4),
        identity={"data": "d"},
    )
    known = {trial.name for trial in searcher.finished()}
    for name, value in (("head only", -0.5), ("spt", -0.2)):
        if name not in known and "--baselines" in flags:
            knobs = {"a": 0.5, "rate": 0.01, "kind": 1}
            outcome = Outcome("done", {"merit": value})
            searcher.add_finished(Trial(0, name, "baseline", knobs, "d", 1, {"lora": 1}, outcome, (value,)))
            say("baseline", name)
    begun = -1
    while True:
        say("reaped", *searcher.reap())
        if searcher.remaining(total) <= 0:
            if not searcher.others_running():
                break
            time.sleep(0.05)
            continue
        asked = searcher.ask()
        begun += 1
        say("asked", asked.number)
        hang(flags, begun, 0)
        values = dict(asked.values)
        key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        if searcher.claim_key(asked.number, key) is not None:
            raise SystemExit("the same point twice")
        stopped = False
        for epoch in range(1, EPOCHS + 1):
            time.sleep(pause)
            stopped = searcher.report(asked.number, epoch, merit(values, epoch))
            hang(flags, begun, epoch)
            if stopped:
                break
        if stopped:
            searcher.tell(asked.number, Outcome("pruned", reason="not among the best"))
        else:
            searcher.tell(asked.number, Outcome("done", {"merit": merit(values, EPOCHS)}), (merit(values, EPOCHS),))
        say("told", asked.number)
    say("finished", searcher.count())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
