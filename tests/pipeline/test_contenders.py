"""Every contender on a small prepared study: within its budget, deterministic, as many tries as every other."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from autopeft.allocation.knapsack import Knapsack
from autopeft.config.limits import LimitSettings
from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Backend
from autopeft.errors import UnknownPlugin
from autopeft.pipeline import rivals
from autopeft.pipeline.contenders import (
    CONTENDERS,
    DEFAULT_CONTENDERS,
    all_contenders,
    contender,
    contender_groups,
    contender_names,
)
from autopeft.pipeline.effort import Effort
from autopeft.pipeline.events import silent
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.planfile import read_plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.portfolio import portfolio
from autopeft.pipeline.replay import replay
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.tune import tune

REFERENCES = {"full", "adalora"}


@pytest.fixture(scope="module")
def groups(prepared, study):
    return {name: contender(name, prepared, study) for name in CONTENDERS}


def count(prepared, candidate, study) -> int:
    """Parameters that training would change: those of the model that ask for a gradient, without the head's."""
    trained = candidate.under(study)
    backend: Backend = trained.backend
    with backend.insert(prepared.model, prepared.catalog, candidate.allocation, trained.methods) as inserted:
        head = {id(p) for p in inserted.groups()["head"]}
        return sum(p.numel() for p in inserted.model.parameters() if p.requires_grad and id(p) not in head)


@pytest.mark.parametrize("name", sorted(rivals.BUILTIN))
def test_within_the_budget_by_an_independent_count(name, groups, prepared, study):
    group = groups[name]
    assert group.candidates, group.reason
    assert not group.reason
    assert (group.role == "reference") == (name in REFERENCES)
    for candidate in group.candidates:
        found = count(prepared, candidate, study)
        assert found == candidate.allocation.spent
        assert group.role == "reference" or found <= prepared.budget.limit
        if name != "head_only":
            assert found


@pytest.mark.parametrize("name", sorted(rivals.BUILTIN))
def test_deterministic(name, groups, prepared, study):
    again = contender(name, prepared, study)
    assert [c.name for c in again.candidates] == [c.name for c in groups[name].candidates]
    assert [c.allocation.digest for c in again.candidates] == [c.allocation.digest for c in groups[name].candidates]


class Counting(Runner):
    """Notes which trainings were asked for."""

    def train(self, study, allocation, **kwargs):
        self.asked.append((allocation.digest, study.train.lr_scale, study.train.epochs))
        return super().train(study, allocation, **kwargs)


@pytest.mark.parametrize("name", sorted(rivals.BUILTIN))
def test_same_number_of_tries_and_a_plan_that_replays(name, groups, prepared, study, tmp_path):
    group = groups[name]
    runner = Counting(prepared, Ledger(tmp_path / "ledger"), silent)
    runner.asked = []
    # Two variants are enough to see that each gets its tries.
    group = dataclasses.replace(group, candidates=group.candidates[:2])
    tuned = tune(runner, study, group, Effort(2, 1, tries=3))
    short = [(digest, scale) for digest, scale, epochs in runner.asked if epochs == 1]
    adapted = [c for c in group.candidates if len(c.allocation)]
    for candidate in adapted:
        scales = [scale for digest, scale in short if digest == candidate.allocation.digest]
        assert scales == pytest.approx([10**-0.5, 1.0, 10**0.5])
    assert set(tuned.variants) == {c.name for c in adapted}
    # In full: what was best in short, and half a decade more. A plan of nothing has no rate to tune.
    full = [scale for _, scale, epochs in runner.asked if epochs == 2]
    assert full == (pytest.approx([full[0], full[0] * 10**0.5]) if adapted else [1.0])
    assert tuned.lr_scale in full
    assert tuned.outcome.status == "done"
    assert tuned.outcome.trainable == tuned.candidate.allocation.trainable

    write_plan(as_plan(prepared, tuned.study, tuned.candidate.allocation), tmp_path / "plan.json")
    again = replay(read_plan(tmp_path / "plan.json"), tmp_path / "again").result.outcome
    assert again.metrics == tuned.outcome.metrics


def test_full_fine_tuning_trains_all_but_the_head(groups, prepared):
    (candidate,) = groups["full"].candidates
    assert candidate.allocation.spent == prepared.catalog.n_base
    assert "not within the budget" in groups["full"].note


def test_adalora_ends_within_the_budget_and_says_that_it_begins_above(groups, prepared):
    for candidate in groups["adalora"].candidates:
        ranks = 0
        for option in candidate.allocation:
            site = prepared.catalog[option.site]
            unit = site.in_features + site.out_features + 1
            assert option.cost.trainable == option.size * unit
            ranks += max(1, 2 * option.size // 3) * unit
        assert ranks <= prepared.budget.limit
    assert any(c.allocation.spent > prepared.budget.limit for c in groups["adalora"].candidates)
    assert "exceeds the budget while training" in groups["adalora"].note


def test_random_mixes_are_five_different_plans(groups, prepared, study):
    assert len(groups["random_mix"].candidates) == 5
    hurried = dataclasses.replace(study, search=dataclasses.replace(study.search, time_limit=60.0))
    assert len(contender("random_mix", prepared, hurried).candidates) == 2


def test_names_are_written_out_and_unknown_ones_guessed_at():
    assert contender_names(("default",)) == DEFAULT_CONTENDERS
    assert contender_names(("dora", "default", "dora")) == ("dora", *DEFAULT_CONTENDERS)
    assert set(contender_names(("all",))) == set(rivals.BUILTIN)
    with pytest.raises(UnknownPlugin, match="Did you mean 'uniform_lora'"):
        contender_names(("unifrom_lora",))


def asking(study, *names, methods=None):
    search = dataclasses.replace(study.search, contenders=names)
    return dataclasses.replace(study, search=search, methods=methods or study.methods)


def test_the_default_leaves_out_what_the_study_has_no_method_for_and_says_so(prepared, study):
    lean = asking(study, "default", methods={"core": study.methods["core"]})
    entered = {g.name: g for g in all_contenders(prepared, lean)}
    assert not entered["uniform lora"].candidates
    assert "no method 'lora'" in entered["uniform lora"].reason
    assert "uniform lora" not in {g.name for g in contender_groups(prepared, lean)}
    assert [g.name for g in contender_groups(prepared, lean)][-1] == "default plan"
    named = {g.name: g for g in all_contenders(prepared, asking(lean, "uniform_lora", methods=lean.methods))}
    assert set(named["uniform lora"].candidates[0].methods) == {"lora"}


def test_what_the_budget_cannot_express_is_listed_with_its_reason(prepared, study):
    tight = dataclasses.replace(prepared, budget=dataclasses.replace(prepared.budget, limit=20))
    group = contender("uniform_lora", tight, study)
    assert not group.candidates
    assert "a budget of 20" in group.reason


def test_spread_of_variants_is_the_sample_deviation():
    from autopeft.core.record import Standing

    standing = Standing(variants={"a": 0.5, "b": 0.7, "c": 0.9})
    assert standing.mean == pytest.approx(0.7)
    assert standing.deviation == pytest.approx(math.sqrt((0.04 + 0 + 0.04) / 2))
    assert Standing(variants={"a": 0.5}).mean is None


def test_a_candidate_of_another_backend_leaves_the_study_alone(groups, study):
    candidate = groups["eva"].candidates[0]
    under = candidate.under(study)
    assert type(under.backend).__name__ == "HfPeftBackend"
    assert set(under.methods) - set(study.methods) == {"eva"}
    assert isinstance(candidate.allocation, Allocation)
    plain = groups["uniform_lora"].candidates[0]
    assert plain.under(study) is study


def test_the_borrowed_model_is_left_as_it_was(prepared):
    assert isinstance(prepared.model, nn.Module)
    assert not [n for n, _ in prepared.model.named_modules() if "autopeft" in n]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "limits", [{"allocator": {"forbid": ("method:core",), "max_options": 4}}, {"limits": {"target": "lora"}}]
)
def test_a_race_under_side_constraints_is_won_by_a_plan_that_keeps_them(limits, prepared, study) -> None:
    free = portfolio(prepared, study, contender_groups(prepared, study))
    held = dataclasses.replace(
        study,
        allocator=Knapsack(**limits.get("allocator", {})),
        limits=LimitSettings(**limits.get("limits", {})),
    )
    groups = contender_groups(prepared, held)
    arms = portfolio(prepared, held, groups)
    assert arms[0].name == "default mix"
    assert len(arms) < len(free)
    for arm in arms:
        methods = {o.method for o in arm.allocation}
        if "limits" in limits:
            # A core leaves as a LoRA as well.
            assert methods <= {"lora", "core"}, arm.name
        else:
            assert "core" not in methods, arm.name
            assert len(arm.allocation) <= 4, arm.name
    assert any({o.method for o in arm.allocation} - {"lora", "core"} for arm in free)
    notes = {group.note for group in groups if group.role == "baseline"}
    assert all("not held to the side constraints" in note for note in notes)
    assert not any("not held" in group.note for group in contender_groups(prepared, study))
