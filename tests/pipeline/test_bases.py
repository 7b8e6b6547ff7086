"""Plans whose cores lie between measured bases: the same again, from the run folder, and after training again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autopeft.config.override import override
from autopeft.config.study import DataSettings, Study
from autopeft.core.menu import Option
from autopeft.errors import UsageError
from autopeft.methods.core import Core
from autopeft.models.spec import ModelSpec
from autopeft.pipeline import bases as bases_module
from autopeft.pipeline.bases import TRAJECTORY_SHARE, asked_bases, measure_bases, short_schedule
from autopeft.pipeline.contenders import contender_groups
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.planfile import read_plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.replay import replay
from autopeft.pipeline.trial import run_trial
from autopeft.training.settings import TrainSettings

KWARGS = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def study(pictures):
    base = Study()
    return dataclasses.replace(
        base,
        model=ModelSpec("vit_tiny_patch16_224", pretrained=False, img_size=8, kwargs=KWARGS),
        data=DataSettings(str(pictures), batch_size=8),
        budget="5%",
        methods={"moved": Core("trajectory"), "read": Core("activation", "diagonal"), "agreed": Core("aligned")},
        train=dataclasses.replace(base.train, epochs=2, threads=1),
    )


def test_short_schedule_is_five_per_cent_of_the_samples():
    for settings in (TrainSettings(epochs=4), TrainSettings(epochs=100), TrainSettings(epochs=10, data_fraction=0.3)):
        short = short_schedule(settings)
        asked = TRAJECTORY_SHARE * settings.epochs * settings.data_fraction
        assert short.epochs * short.data_fraction == pytest.approx(asked, rel=0.11)
        assert 0 < short.data_fraction <= 1


def test_methods_say_what_they_need():
    assert asked_bases({"a": Core(), "b": Core("gradient"), "c": Core("random")}) == {}
    assert asked_bases({"a": Core("trajectory"), "b": Core("trajectory", "blocks")}) == {"trajectory": 64}


def test_a_plan_carries_its_bases_and_trains_to_the_same_metric_again(study, tmp_path, monkeypatch):
    prepared = prepare(study, tmp_path / "run")
    model = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    plan = make_plan(prepared, study)
    assert all(torch.equal(tensor, model[name]) for name, tensor in prepared.model.state_dict().items())
    assert plan.trainable <= prepared.budget.limit
    assert plan.options
    assert all(option.bases is not None for option in plan)
    # One pass for each of two bases, and a share of the schedule, rounded up to a batch.
    inner = prepared.task.sizes["inner"]
    trained = prepared.basis_samples - 2 * inner
    assert 0 < trained <= TRAJECTORY_SHARE * 2 * inner + 8

    # A later process of the same run measures nothing and makes the same plan.
    again = prepare(study, tmp_path / "run")
    monkeypatch.setattr(bases_module, "_MAKERS", dict.fromkeys(bases_module._MAKERS, None))
    assert make_plan(again, study).digest == plan.digest
    assert again.basis_samples == prepared.basis_samples
    monkeypatch.undo()

    result = run_trial(prepared, study, plan, seed=0, folder=tmp_path / "trial")
    write_plan(as_plan(prepared, study, plan, 0), tmp_path / "plan.json")
    repeated = replay(read_plan(tmp_path / "plan.json"), tmp_path / "again")
    assert repeated.result.outcome.metrics == result.outcome.metrics
    bare = dataclasses.replace(plan, options=tuple(dataclasses.replace(o, bases=None) for o in plan))
    with pytest.raises(UsageError, match="carries no bases"):
        run_trial(prepared, study, bare, seed=0, folder=None)


def test_another_run_measures_the_same_bases(study):
    one, two = prepare(study), prepare(study)
    for name in ("activation", "aligned", "trajectory"):
        first, second = measure_bases(one, name, 4), measure_bases(two, name, 4)
        assert first.samples == second.samples
        for site, (left, right) in first.pairs.items():
            assert torch.equal(left, second.pairs[site][0])
            assert torch.equal(right, second.pairs[site][1])
            torch.testing.assert_close(left.T @ left, torch.eye(4), atol=1e-4, rtol=0)
            torch.testing.assert_close(right.T @ right, torch.eye(4), atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="nobody knows how to measure the bases 'wild'"):
        measure_bases(one, "wild", 4)


def test_a_damaged_file_is_measured_again(study, tmp_path, caplog):
    prepared = prepare(study, tmp_path)
    before = measure_bases(prepared, "activation", 4)
    path = tmp_path / "scores" / "bases_activation.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    after = measure_bases(prepared, "activation", 4)
    assert "measured again" in caplog.text
    assert all(torch.equal(pair[0], after.pairs[site][0]) for site, pair in before.pairs.items())


def test_uniform_cores_get_their_bases_too(study):
    study = dataclasses.replace(study, methods={"core": Core("activation")})
    prepared = prepare(study)
    groups = {group.name: group for group in contender_groups(prepared, study)}
    options: tuple[Option, ...] = groups["uniform core"].candidates[0].allocation.options
    assert all(option.bases is not None for option in options)


def test_the_basis_is_a_setting_of_the_study(study):
    found = override(Study(), {"methods.core.basis": "trajectory", "methods.core.shape": "blocks"})
    assert found.methods["core"] == Core("trajectory", "blocks")
