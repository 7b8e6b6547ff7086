from __future__ import annotations

import optuna
import pytest

from autopeft.errors import CorruptFile, StaleRun
from autopeft.search.identity import claim, differences, read_attribute, write_attribute


@pytest.fixture
def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(study_name="birds")


def test_the_same_identity_may_join(study: optuna.Study) -> None:
    identity = {"data": "d", "study": {"lr": 1e-3, "splits": ("inner", "outer")}}
    claim(study, identity)
    claim(study, identity)


def test_another_identity_is_refused_by_name(study: optuna.Study) -> None:
    claim(study, {"data": "d", "study": {"lr": 0.1, "seed": 0}})
    with pytest.raises(StaleRun, match=r"'birds' was begun with other settings: study\.lr was 0\.1 and is 0\.2 now\. "):
        claim(study, {"data": "d", "study": {"lr": 0.2, "seed": 0}})


def test_many_differences_are_counted(study: optuna.Study) -> None:
    claim(study, {str(i): 0 for i in range(5)})
    with pytest.raises(StaleRun, match="and 2 more"):
        claim(study, {str(i): 1 for i in range(5)})


def test_a_foreign_study_is_refused(study: optuna.Study) -> None:
    study.tell(study.ask(), 0.0)
    with pytest.raises(StaleRun, match="trials that autopeft did not make"):
        claim(study, {})


def test_the_faster_of_two_processes_wins(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes between our look and our write."""
    import autopeft.search.identity as module

    def late(study: optuna.Study, name: str, value: object) -> None:
        write_attribute(study, name, {"data": "theirs"})

    monkeypatch.setattr(module, "write_attribute", late)
    with pytest.raises(StaleRun, match="data was 'theirs' and is 'ours' now"):
        claim(study, {"data": "ours"})


def test_differences() -> None:
    assert differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [1]}}) == []
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3, "d": 4}}) == [
        ("a", 1, None),
        ("b.c", 2, 3),
        ("b.d", None, 4),
    ]


def test_attributes_are_json(study: optuna.Study) -> None:
    write_attribute(study, "payload", {"x": [1, None, "é"]})
    assert read_attribute(study, "payload") == {"x": [1, None, "é"]}
    assert read_attribute(study, "other") is None
    study.set_user_attr("autopeft:payload", "{")
    with pytest.raises(CorruptFile, match="'payload' of the study 'birds'"):
        read_attribute(study, "payload")
