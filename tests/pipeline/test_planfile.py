import json

import numpy as np
import pytest
import torch

from autopeft.core.allocation import Allocation
from autopeft.core.bases import Bases
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Place
from autopeft.errors import CorruptFile, InfeasibleBudget, UsageError
from autopeft.pipeline.planfile import Plan, plan_to_json, read_plan, write_plan


def sparse(n=3, site="blocks.0.fc"):
    indices = Indices(np.arange(n, dtype=np.int64) * 2)
    return Option(site, "sparse", n, Cost(n, 2 * n, 64 * n, n), 0.25, (Place(site, "weight"),), indices)


def norm(site="blocks.0.norm"):
    places = (Place(site, "bias"), Place(site, "weight"))
    return Option(site, "norm", 1, Cost.plain(8, 8, 2), 0.5, places)


@pytest.fixture
def plan():
    allocation = Allocation((sparse(), norm()), Budget(20, text="20"))
    return Plan(
        allocation, "toy", "abc", {"seed": 3}, 3, 1, "wh", "dh", {"head.weight": torch.arange(6.0).reshape(2, 3)}
    )


def test_written_and_read_back_is_the_same_plan(plan, tmp_path):
    write_plan(plan, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again.allocation == plan.allocation
    assert again.allocation.digest == plan.allocation.digest
    assert torch.equal(again.head["head.weight"], plan.head["head.weight"])
    assert (again.study, again.seed, again.threads, again.weights_hash) == ({"seed": 3}, 3, 1, "wh")
    assert again.allocation.options[1].indices == plan.allocation.options[1].indices


def test_bases_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    bases = Bases(rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32))
    option = Option("fc", "core", 2, Cost(4, 22, 704, 20, 3), 0.5, (Place("fc", "weight"),), None, bases)
    write_plan(Plan(Allocation((option,), Budget(10)), "toy", "abc"), tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json").allocation.options[0]
    assert np.array_equal(again.bases.left, bases.left)
    assert np.array_equal(again.bases.right, bases.right)
    assert again == option
    edit(tmp_path / "plan.json", lambda data: data["options"][0].update(bases_sha256="0" * 64))
    with pytest.raises(CorruptFile, match="bases of fc/core do not match"):
        read_plan(tmp_path / "plan.json")


def test_json_has_the_documented_keys(plan):
    data = plan_to_json(plan)
    assert data["schema"] == "autopeft.plan/1"
    assert data["budget"]["limit"] == 20
    assert data["budget"]["spent"] == 11
    row = next(o for o in data["options"] if o["method"] == "norm")
    assert (row["site"], row["slot"], row["size"], row["cost"], row["gain"]) == (
        "blocks.0.norm",
        "bias+weight",
        1,
        8,
        0.5,
    )


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_smaller_budget_than_the_options_cost_is_refused(plan, tmp_path):
    write_plan(plan, tmp_path / "plan.json")
    edit(tmp_path / "plan.json", lambda d: d["budget"].update(limit=10))
    with pytest.raises(InfeasibleBudget, match="costs 11"):
        read_plan(tmp_path / "plan.json")


def test_an_edited_option_is_noticed(plan, tmp_path):
    write_plan(plan, tmp_path / "plan.json")
    edit(tmp_path / "plan.json", lambda d: d["options"][0].update(cost=7))
    with pytest.raises(CorruptFile, match="edited"):
        read_plan(tmp_path / "plan.json")


def test_changed_or_missing_tensors_are_noticed(plan, tmp_path):
    write_plan(plan, tmp_path / "plan.json")
    tensors = tmp_path / "plan.safetensors"
    payload = tensors.read_bytes()
    tensors.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    with pytest.raises(CorruptFile, match="digest"):
        read_plan(tmp_path / "plan.json")
    tensors.unlink()
    with pytest.raises(CorruptFile, match="missing beside it"):
        read_plan(tmp_path / "plan.json")


def test_no_plan_and_no_json(tmp_path):
    with pytest.raises(UsageError, match="no plan at"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"schema": "other"}')
    with pytest.raises(CorruptFile, match="not a plan"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"schema": "autopeft.plan/1"}')
    with pytest.raises(CorruptFile, match="not a whole plan"):
        read_plan(tmp_path / "plan.json")
