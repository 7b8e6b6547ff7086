import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autopeft.allocation.from_spt import read_spt
from autopeft.cli.main import app
from autopeft.config.decode import load_study
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.planning import plan_from_spt
from autopeft.pipeline.replay import replay

FILES = Path(os.environ.get("AUTOPEFT_SPT_FILES", Path(__file__).parents[3] / "shared/data/spt_allocations"))
VIT_B = {"model.spec": "vit_base_patch16_224", "model.pretrained": False, "model.img_size": 32}


@pytest.mark.skipif(not FILES.is_dir(), reason="the released SPT files are not on this machine")
@pytest.mark.parametrize(
    ("name", "module", "other"), [("lora_cifar_0.4", "lora", "adapter"), ("adapter_cifar_0.4", "adapter", "lora")]
)
def test_released_files_are_read_with_their_own_modules(pictures, name, module, other):
    study = load_study([], {**VIT_B, "data.spec": str(pictures)})
    said = []
    plan = plan_from_spt(study, FILES / f"{name}.pth", said.append)
    used = {o.method for o in plan.allocation}
    assert module in used
    assert other not in used
    assert plan.allocation.trainable == read_spt(FILES / f"{name}.pth").params
    assert not [event for event in said if event.kind == "warning"], said


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="the released SPT files are not on this machine")
def test_a_released_allocation_trains(pictures, tmp_path):
    study = load_study([], {**VIT_B, "data.spec": str(pictures)})
    plan = plan_from_spt(study, FILES / "lora_svhn_0.1.pth")
    done = replay(plan, tmp_path / "trained", overrides={"train.epochs": 1})
    assert done.result.outcome.status == "done"
    assert done.result.outcome.trainable == plan.allocation.trainable


def test_plan_writes_a_file_that_reads_back(small, pictures, tmp_path):
    path = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["plan", *small, "--data", str(pictures), "-o", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    plan = read_plan(path)
    assert plan.allocation.spent <= plan.allocation.budget.limit == 373
    assert "head not counted" in result.stdout
    assert "proven optimal; 1 % more budget would add about" in result.stdout
    for option in plan.allocation:
        assert option.site in result.stdout


def test_the_same_settings_give_the_same_plan(small, pictures, tmp_path):
    digests = set()
    for name in ("a", "b"):
        path = tmp_path / f"{name}.json"
        CliRunner().invoke(app, ["plan", *small, "--data", str(pictures), "-o", str(path)], catch_exceptions=False)
        digests.add(read_plan(path).allocation.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("allocator", ["random", "head_only", "uniform", "spt"])
def test_every_allocator_plans_within_the_budget(small, pictures, tmp_path, allocator):
    path = tmp_path / "plan.json"
    args = ["plan", *small, "--data", str(pictures), "--allocator", allocator, "-o", str(path), "fused=slices"]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    plan = read_plan(path)
    assert plan.allocation.spent <= 373
    assert len(plan.allocation) or allocator == "head_only"


@pytest.mark.parametrize("scorer", ["gradient", "magnitude", "random"])
def test_every_scorer_plans(small, pictures, tmp_path, scorer):
    path = tmp_path / "plan.json"
    args = ["plan", *small, "--data", str(pictures), "--scorer", scorer, "-o", str(path)]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert len(read_plan(path).allocation)


@pytest.mark.parametrize(("budget", "unit"), [("100", "trainable"), ("2KB", "bytes"), ("300entries", "entries")])
def test_every_unit_of_budget(small, pictures, tmp_path, budget, unit):
    path = tmp_path / "plan.json"
    args = ["plan", *small, "--data", str(pictures), "--budget", budget, "-o", str(path)]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    plan = read_plan(path)
    assert plan.allocation.budget.unit == unit
    assert 0 < plan.allocation.spent <= plan.allocation.budget.limit


def test_a_budget_like_a_uniform_plan(small, pictures, tmp_path):
    path = tmp_path / "plan.json"
    args = ["plan", *small, "--data", str(pictures), "--budget", "like:lora-r1@qkv", "-o", str(path)]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    # Two blocks, rank 1 on 48 x 16: 2 * (48 + 16).
    assert read_plan(path).allocation.budget.limit == 128


@pytest.mark.parametrize("mergeable", [True, False])
def test_what_cannot_be_merged_is_offered_on_request_alone(small, pictures, tmp_path, mergeable):
    path = tmp_path / "plan.json"
    # Adapters are favoured so much that they are bought wherever they are offered.
    knobs = ["gain.methods.adapter=1000", f"mergeable={str(mergeable).lower()}"]
    args = ["plan", *small, "--data", str(pictures), "-o", str(path), *knobs]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    used = {o.method for o in read_plan(path).allocation}
    assert ("adapter" in used) != mergeable


def planned(small, pictures, tmp_path, *flags):
    args = ["plan", *small, "--data", str(pictures), "-o", str(tmp_path / "plan.json"), "--quiet", *flags]
    return CliRunner().invoke(app, args, catch_exceptions=False)


def test_a_plan_says_how_well_it_is_packed(small, pictures, tmp_path):
    result = planned(small, pictures, tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    facts = data["packing"]
    assert data["schema"] == "autopeft.plan/1"
    assert facts["gain"] == pytest.approx(sum(o["gain"] for o in data["options"]))
    assert facts["bound"] >= facts["gain"]
    assert facts["gap"] == 0.0
    assert facts["price"] > 0
    assert facts["unspent"] == data["budget"]["limit"] - data["budget"]["spent"]
    rival = facts["next_best"]
    added, removed = (sum(o["gain"] for o in rival[key]) for key in ("added", "removed"))
    assert rival["proven"]
    assert rival["removed"]
    assert rival["gain"] == pytest.approx(facts["gain"] + added - removed)
    assert rival["loss"] == pytest.approx(1 - rival["gain"] / facts["gain"])
    assert rival["loss"] >= 0
    assert read_plan(tmp_path / "plan.json").packing == facts
    assert "the next best plan gains" in planned(small, pictures, tmp_path).stdout


def test_side_constraints_from_the_command_line(small, pictures, tmp_path):
    flags = [
        "--require",
        "blocks.0.mlp.fc1",
        "--forbid",
        "role:attn.*",
        "--forbid",
        "method:bias",
        "--max-methods",
        "2",
    ]
    flags += ["--max-size", "lora=1", "--max-options", "4", "--every-block", "--methods", "lora,core,bias,norm"]
    result = planned(small, pictures, tmp_path, *flags)
    assert result.exit_code == 0, result.stderr
    options = read_plan(tmp_path / "plan.json").allocation.options
    assert any(o.site == "blocks.0.mlp.fc1" for o in options)
    assert any(o.site.startswith("blocks.1.") for o in options)
    assert not [o for o in options if ".attn." in o.site or o.method == "bias" or (o.method == "lora" and o.size > 1)]
    assert len(options) <= 4
    assert len({o.method for o in options}) <= 2


def test_ties_from_the_command_line(small, pictures, tmp_path):
    result = planned(small, pictures, tmp_path, "--tie", "role", "--methods", "core,bias")
    assert result.exit_code == 0, result.stderr
    bought = {}
    for o in read_plan(tmp_path / "plan.json").allocation:
        bought.setdefault((o.site.split(".")[-1], o.method), []).append(o.size)
    in_blocks = {key: sizes for key, sizes in bought.items() if key[0] in ("qkv", "fc1", "fc2")}
    assert in_blocks, bought
    assert all(len(sizes) == 2 and len(set(sizes)) == 1 for sizes in in_blocks.values()), bought


def test_constraints_that_cost_too_much(small, pictures, tmp_path):
    flags = ["--methods", "core", "--require", "role:mlp.*", "--budget", "3"]
    result = planned(small, pictures, tmp_path, *flags)
    assert result.exit_code == 3
    assert "the cheapest one costs 4 (core of size 1 at blocks.0.mlp.fc1" in " ".join(result.stderr.split())
    # No LoRA is cheap enough to be on the menu: what it would cost is told from the prices without a budget.
    flags = ["--methods", "lora,core", "--require", "method:lora", "--budget", "20", "--forbid", "patch_embed*"]
    result = planned(small, pictures, tmp_path, *flags)
    assert result.exit_code == 3
    assert "the cheapest one costs 32 (lora of size 1 at blocks." in " ".join(result.stderr.split())


def test_a_target_holds_what_its_exporter_takes(small, pictures, tmp_path):
    result = planned(
        small, pictures, tmp_path, "--target", "lora", "--max-rank", "3", "fused=slices", "--budget", "20%"
    )
    assert result.exit_code == 0, result.stderr
    plan = read_plan(tmp_path / "plan.json")
    assert {o.method for o in plan.allocation} <= {"lora", "core"}
    ranks = {}
    for o in plan.allocation:
        module = o.site.partition("[")[0]
        ranks[module] = ranks.get(module, 0) + o.size
    assert max(ranks.values()) == 3
    free = planned(small, pictures, tmp_path, "--target", "lora", "fused=slices", "--budget", "20%", "--json")
    assert json.loads(free.stdout)["packing"]["gain"] > plan.allocation.gain
    low = json.loads(planned(small, pictures, tmp_path, "--max-rank", "1", "--budget", "20%", "--json").stdout)
    assert max(o["size"] for o in low["options"] if o["method"] in ("lora", "core")) == 1
    assert {o["method"] for o in low["options"]} - {"lora", "core"}
    none = planned(small, pictures, tmp_path, "--target", "peft", "--methods", "bias")
    assert none.exit_code == 3
    assert "none of the methods bias has an option" in " ".join(none.stderr.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--target", "lroa"), "limits.target"),
        (("--max-rank", "0"), "limits.max_rank must be a whole number of at least 1, got 0"),
        (("--max-flops", "lots"), "limits.max_flops must be a number above 0 with one of K, M, G, T, P, such as 1.5T"),
        (("--max-memory", "0GB"), "limits.max_memory must be a number above 0 with one of B, KB, MB, GB"),
        (("limits.max_flop=1T",), "max_flops"),
    ],
)
def test_limits_that_cannot_be_read(small, pictures, tmp_path, flags, said):
    result = planned(small, pictures, tmp_path, *flags)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_limits_from_a_study_file(small, pictures, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("limits:\n  target: lora\n  max_rank: 2\n  max_flops: 1e12\n  max_memory: 1GB\n")
    result = planned(small, pictures, tmp_path, "--config", str(file), "--json")
    assert result.exit_code == 0, result.stderr
    options = json.loads(result.stdout)["options"]
    assert {o["method"] for o in options} <= {"lora", "core"}
    assert max(o["size"] for o in options) <= 2


def test_caps_from_the_command_line(small, pictures, tmp_path):
    free = json.loads(planned(small, pictures, tmp_path, "--json").stdout)
    assert any(o["site"].startswith("blocks.0.") for o in free["options"])
    refused = planned(small, pictures, tmp_path, "--max-memory", "0.001KB")
    assert refused.exit_code == 2
    assert "are used without any adapter" in " ".join(refused.stderr.split())
    used = float(" ".join(refused.stderr.split()).split("less than the ")[1].split(" ")[0].replace(",", ""))
    held = planned(small, pictures, tmp_path, "--max-memory", f"{1.3 * used:.0f}B", "--json")
    if held.exit_code == 0:
        capped = json.loads(held.stdout)
        assert capped["packing"]["gain"] < free["packing"]["gain"]
        assert not any(o["site"].startswith("blocks.0.") for o in capped["options"])
    else:
        assert held.exit_code == 3
    assert planned(small, pictures, tmp_path, "--max-memory", "1GB", "--max-flops", "1T", "--json").exit_code == 0
