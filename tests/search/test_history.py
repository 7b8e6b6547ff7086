from __future__ import annotations

import optuna
from optuna.trial import TrialState, create_trial

from autopeft.search.history import counted, finished, ordinal, role_of, with_state


def test_what_counts() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    rows: list[tuple[TrialState, dict[str, object]]] = [
        (TrialState.COMPLETE, {"role": "baseline"}),
        (TrialState.COMPLETE, {"role": "default"}),
        (TrialState.COMPLETE, {}),
        (TrialState.FAIL, {"role": "trial", "replaced": True}),
        (TrialState.WAITING, {"role": "trial"}),
        (TrialState.PRUNED, {"role": "trial"}),
        (TrialState.FAIL, {"role": "trial"}),
        (TrialState.RUNNING, {"role": "trial"}),
    ]
    for state, attrs in rows:
        value = 0.0 if state == TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, value=value, user_attrs=attrs))
    trials = study.get_trials()
    assert [t.number for t in counted(trials)] == [2, 5, 6]
    assert [t.number for t in finished(trials)] == [0, 1, 2, 5, 6]
    assert [ordinal(n, trials) for n in range(9)] == [0, 0, 0, 1, 1, 2, 3, 4, 5]
    assert role_of(trials[2]) == "trial"
    assert [t.number for t in with_state(trials, TrialState.FAIL)] == [3, 6]
