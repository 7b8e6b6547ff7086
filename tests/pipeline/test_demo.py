"""What the first run of a newcomer is limited to, and what is left as it was asked."""

from __future__ import annotations

import dataclasses

from autopeft.config.decode import load_study
from autopeft.pipeline.demo import with_demo_limits

DENOISER = {"task.type": "diffusion"}


def test_only_the_bundled_task_is_limited_and_only_where_nothing_was_asked() -> None:
    study = load_study([], {})
    limited = with_demo_limits(study, set())
    assert dataclasses.replace(limited, search=study.search) == study
    assert limited.search.time_limit == 150
    assert with_demo_limits(study, {"search.trials"}) is study
    other = load_study([], {"data.spec": "elsewhere"})
    assert with_demo_limits(other, set()) is other


def test_a_denoiser_has_time_for_trials() -> None:
    study = load_study([], DENOISER)
    limited = with_demo_limits(study, {"budget"})
    assert limited.search.time_limit == 200
    assert len(limited.search.contenders) == 4
    assert (limited.data.max_inner, limited.task.draws) == (300, 2)  # type: ignore[attr-defined]
    assert limited.data.spec == study.data.spec


def test_what_a_study_says_of_a_denoiser_stays() -> None:
    said = {"data.max_inner": 50, "task.draws": 3, "search.contenders": "all"}
    study = load_study([], {**DENOISER, **said})
    limited = with_demo_limits(study, set())
    assert (limited.data, limited.task) == (study.data, study.task)
    assert limited.search.contenders == ("all",)
