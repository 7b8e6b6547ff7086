"""The second currency from a denoiser's own memorisation to a plan, and what comes of it when a step is taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.allocation._cross import cross_valued
from autopeft.allocation.memory import memory_changes
from autopeft.config.decode import load_study
from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, Scores
from autopeft.core.site import Catalog
from autopeft.errors import InfeasibleBudget, UsageError
from autopeft.methods.bias import Bias
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.sparse import Sparse
from autopeft.models.scan import scan
from autopeft.pipeline.costs import SCORING, fixed_costs
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.planfile import plan_to_json, read_plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.report.rows import allocation_rows
from autopeft.report.tables import allocation_table
from autopeft.scoring.calibrated import Calibrated
from autopeft.scoring.gradient import Gradient
from autopeft.tasks.denoising import DenoisingTask
from autopeft.tasks.diffusion import Diffusion
from autopeft.testing.tiny_denoiser import denoiser_config, tiny_denoiser, tiny_pipeline

CONFIG = denoiser_config()
SETTINGS: dict[str, Any] = {
    "task": {"type": "diffusion", "draws": 1, "steps": 2},
    "budget": "2%",
    "data.spec": "digits?planted=2&repeat=2",
    "data.max_samples": 60,
    "methods": ["lora", "bias", "norm"],
    "scorer": {"type": "calibrated", "folds": 0, "memory": "noise_difference"},
    "device": "cpu",
}


def remembered(model: nn.Module, task: DenoisingTask) -> Tensor:
    """M over all that is measured, float64."""
    batches = list(task.recall_batches(8))
    parts = [task.recall(model, batch) * len(batch.images) for batch in batches]
    return torch.stack(parts).sum() / sum(len(batch.images) for batch in batches)


@dataclasses.dataclass(frozen=True)
class Measured:
    model: nn.Module
    task: DenoisingTask
    catalog: Catalog
    scores: Scores
    scorer: Calibrated


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["plain", "preconditioned"])
def wide(request: pytest.FixtureRequest) -> Measured:
    """A denoiser in float64, and its scores in the coordinates of the entries."""
    task = Diffusion(label_dropout=0.0).open("digits?planted=3&repeat=2", CONFIG, None, 0, {"max_samples": 60})
    model = tiny_denoiser(labels=11).double()
    model.conv_in.register_forward_pre_hook(lambda module, given: (given[0].double(),))  # type: ignore[operator,union-attr]  # a convolution
    scorer = Calibrated(
        Gradient(batch_size=4, order="file", blocks=False),
        power=request.param,
        preconditioner="diagonal",
        folds=0,
        memory="noise_difference",
    )
    catalog = scan(model)
    return Measured(model, task, catalog, scorer.score(model, catalog, task), scorer)


def root_of_preconditioner(wide: Measured, site: str, slot: str) -> Tensor:
    """`(F + lambda)^(-power / 2)` from the second moments of the evidence: F = b E[g_b^2] and lambda."""
    n, batch = wide.scores.origin.n_samples, 4
    scale = n / -(-n // batch)
    squares = {
        square.data_ptr(): square
        for e in wide.scores.evidence.values()
        if e.site.rows is None
        for square in (k.square for k in e.slots.values())
        if square is not None
    }
    mean = scale * sum(float(s.sum()) for s in squares.values()) / sum(s.numel() for s in squares.values())
    square = wide.scores.evidence[site][slot].square
    assert square is not None
    return (scale * square + wide.scorer.damping * mean).pow(-wide.scorer.power / 2)


def captured(method: Method, evidence: Evidence, size: int) -> dict[str, Tensor]:
    """The part of the signal that an option captures, worked out here: P(s) s."""
    if isinstance(method, LoRA):
        signal = evidence["weight"].signal
        u, sigma, vh = torch.linalg.svd(signal.flatten(1), full_matrices=False)
        return {"weight": ((u[:, :size] * sigma[:size]) @ vh[:size]).view(signal.shape)}
    if isinstance(method, Sparse):
        known = evidence["weight"]
        chosen = known.score.flatten().argsort(descending=True, stable=True)[:size]
        mask = torch.zeros_like(known.signal).flatten()
        mask[chosen] = 1
        return {"weight": known.signal * mask.view(known.signal.shape)}
    return {slot: evidence[slot].signal for slot in method.slots(evidence.site)}


@pytest.mark.parametrize(
    ("method", "site", "size"),
    [
        (Bias(), "mid_block.attentions.0.to_q", 1),
        (Norm(), "mid_block.resnets.0.norm1", 1),
        (LoRA(), "mid_block.attentions.0.to_v", 1),
        (LoRA(), "mid_block.attentions.0.to_v", 4),
        (LoRA(), "down_blocks.0.resnets.0.conv1", 2),
        (Sparse(), "mid_block.resnets.0.conv2", 16),
        (Sparse(), "time_embedding.linear_1", 8),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__ if not isinstance(value, int) else None,
)
def test_memorisation_changes_as_predicted(wide: Measured, method: Method, site: str, size: int) -> None:
    """M is measured before and after the option's own step, a little of it either way, in float64."""
    evidence = wide.scores.evidence[site]
    assert size in method.sizes(evidence.site)
    seen = cross_valued(evidence) if method.family == "entries" else evidence
    found = memory_changes(lambda e: method.gains(e.site, e, (size,)), seen, wide.scores.origin.memory)
    assert found is not None
    steps = {
        slot: -root_of_preconditioner(wide, site, slot) * part for slot, part in captured(method, seen, size).items()
    }
    module = wide.model.get_submodule(evidence.site.module)
    tensors = {slot: getattr(module, slot) for slot in steps}
    length = sum(float(step.square().sum()) for step in steps.values()) ** 0.5
    little = 1e-4 / length
    sides = []
    with torch.no_grad():
        before = {slot: tensor.clone() for slot, tensor in tensors.items()}
        for sign in (1, -1):
            for slot, tensor in tensors.items():
                tensor.copy_(before[slot] + sign * little * steps[slot])
            sides.append(float(remembered(wide.model, wide.task)))
        for slot, tensor in tensors.items():
            tensor.copy_(before[slot])
    assert found[0] == pytest.approx((sides[0] - sides[1]) / (2 * little), rel=1e-5)
    assert abs(found[0]) > 1e-9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("priced") / "model")


def prepared_for(folder: Path, run: Path | None = None, **changes: Any) -> Prepared:
    settings = {**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}}
    return prepare(load_study([], {**settings, "model.spec": f"diffusers:{folder}"}), run)


def test_a_plan_of_a_denoiser_shows_what_it_remembers(folder: Path, tmp_path: Path) -> None:
    """Scores are read back with the second signal, no price is today's plan, and a price is written and shown."""
    prepared = prepared_for(folder, tmp_path / "run")
    study = prepared.study
    assert prepared.scores.origin.memory == "noise_difference"
    # Two planted images at four draws, with their condition and without.
    assert prepared.sample_epochs == prepared.scores.origin.n_samples + 2 * 2 * 4
    assert fixed_costs(prepared)["scoring"] == SCORING * prepared.sample_epochs
    bare = prepared_for(folder, scorer__memory=None)
    free = make_plan(prepared, study)
    assert free.digest == make_plan(bare, bare.study).digest
    assert free.memory is None

    priced = dataclasses.replace(study, gain=dataclasses.replace(study.gain, price=1.0))
    plan = make_plan(prepared, priced)
    assert plan.digest != free.digest
    assert plan.memory is not None
    assert plan.memory < 0, "quality alone lowers the noise difference of an untrained model, and a price more so"
    again = prepared_for(folder, tmp_path / "run")
    assert make_plan(again, priced).options == plan.options
    assert again.sample_epochs == 0, "the scores were measured once"

    kept = as_plan(prepared, priced, plan)
    assert kept.packing["memory"] == plan.memory
    assert "memory" not in as_plan(prepared, study, free).packing
    write_plan(kept, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json").allocation == plan
    assert json.loads((tmp_path / "plan.json").read_text())["study"]["gain"]["price"] == 1.0
    rows = allocation_rows(plan_to_json(kept)["options"])
    table = allocation_table(rows)
    assert table.header[-1] == "memorisation"
    assert sum(row.memory or 0 for row in rows) == pytest.approx(plan.memory)
    assert allocation_table(allocation_rows(free)).header[-1] == "predicted gain"
    assert all("memory" not in option for option in plan_to_json(as_plan(prepared, study, free))["options"])


def test_what_cannot_be_priced_is_said(folder: Path) -> None:
    blind = prepared_for(folder, scorer="fisher", gain__price=0.5)
    with pytest.raises(UsageError, match=r"gain.price is 0.5, but the scores measured nothing.*scorer.memory="):
        make_plan(blind, blind.study)
    gap = prepared_for(folder, scorer__memory="gap")
    assert gap.scores.origin.memory == "gap"
    dear = dataclasses.replace(gap.study, gain=dataclasses.replace(gap.study.gain, price=1e9))
    with pytest.raises(InfeasibleBudget, match=r"at gain.price=1e\+09 no option is worth the memorisation"):
        make_plan(gap, dear)
