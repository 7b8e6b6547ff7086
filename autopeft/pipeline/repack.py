"""Re-packing while training: what training has shown at a third of the way decides where the rest of it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autopeft.allocation.gain import build_menu
from autopeft.allocation.indices import attach_indices
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Menu, Option
from autopeft.core.scores import Scores
from autopeft.errors import AutopeftError, ExportError, InfeasibleBudget, TrainingFailed
from autopeft.methods.core import Core, CoreAdapter
from autopeft.methods.lora import LoRA, LoRAAdapter
from autopeft.pipeline.finish import Finalist, paired_interval
from autopeft.pipeline.phases import FirstPhase, Trained, train_first
from autopeft.pipeline.prices import every_option
from autopeft.pipeline.targets import is_constrained, limited_menus
from autopeft.store.atomic import read_json, write_json
from autopeft.training.handover import retained
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared
    from autopeft.pipeline.runner import Runner

__all__ = ["Repacked", "repack", "repack_plan", "wants_repacking"]

_RETAINED = 0.95
"""Share of the squared norm of a trained change that what is kept of it must hold."""

_TURN = 3
"""The plan turns at this part of the schedule."""


@dataclass(frozen=True)
class Repacked:
    """What came of trying.

    Attributes:
        finalist: the plan in two phases; None when the one-phase plan stays.
        reason: why it stays, or by how much the other one is better.
        sample_epochs: samples seen to find the second plan; the trainings that are compared are in the ledger.
    """

    finalist: Finalist | None
    reason: str
    sample_epochs: int


def wants_repacking(study: Study) -> bool:
    """Whether `search.repack` asks for it: `auto` where the run has no time limit."""
    return study.search.repack == "auto" and study.search.time_limit is None


def repack(runner: Runner, winner: Finalist, folder: Path) -> Repacked:
    """Try a second plan from a third of the winner's training on; keep it when a paired test says that it is better.

    Both are trained with the finishing seeds on the inner split and compared sample by sample on the outer split; the
    95 % interval of the difference (two-level bootstrap over seeds and samples) must lie above 0.

    Args:
        runner: trains through the ledger.
        winner: the chosen plan.
        folder: where the first phase keeps its checkpoint, and what was found.
    """
    study = winner.study
    turn = study.train.epochs // _TURN
    if not turn or not len(winner.allocation) or winner.first is not None:
        return Repacked(None, "the training is too short to turn", 0)
    known = _read(folder, winner)
    if known is not None and known["second"] is None:
        return Repacked(None, known["reason"], known["sample_epochs"])
    first = FirstPhase(winner.allocation, turn)
    try:
        second, seen = repack_plan(runner.prepared, study, first, folder)
    except (ExportError, InfeasibleBudget, TrainingFailed) as error:
        return _write(folder, winner, Repacked(None, str(error), 0))
    if second.digest == winner.allocation.digest:
        return _write(folder, winner, Repacked(None, "training has shown nothing to change", seen))
    pairs = []
    for seed in (study.seed + i for i in range(study.search.seeds)):
        plain = runner.train(
            study, winner.allocation, label=f"{winner.name}, seed {seed}", seed=seed, stage="repacking"
        )
        label = f"{winner.name} repacked, seed {seed}"
        packed = runner.train(study, second, label=label, seed=seed, first=first, stage="repacking")
        if plain.outcome.status == packed.outcome.status == "done":
            pairs.append((packed.merits, plain.merits))
    if not pairs:
        return _write(folder, winner, Repacked(None, "no pair of trainings came to its end", seen))
    low, high = paired_interval([p for p, _ in pairs], [q for _, q in pairs])
    text = f"difference on the outer split in [{low:+.4f}, {high:+.4f}] over {len(pairs)} seeds"
    if low <= 0:
        return _write(folder, winner, Repacked(None, f"not surely better: {text}", seen))
    found = dataclasses.replace(winner, name=f"{winner.name} repacked", allocation=second, first=first)
    return _write(folder, winner, Repacked(found, text, seen))


def repack_plan(
    prepared: Prepared, study: Study, first: FirstPhase, folder: Path | None = None, share: float = _RETAINED
) -> tuple[Allocation, int]:
    """The second plan: ranks that carry little are cut, what is freed goes where the gradient is largest now.

    Every LoRA and core keeps the smallest size that holds a share of its trained change. The trained change is merged,
    the study's scorer looks at the merged model, and the knapsack spends what is left on larger sizes of what is there
    (at the difference of gain and cost) and on free places, of what the side constraints offer. Everything else stays.

    Args:
        prepared: model, task and budget.
        study: methods, scorer and settings.
        first: the first phase; it is trained here with the study's seed.
        folder: where its checkpoint lies; None keeps none.
        share: of the squared norm of a trained change, what must be kept of it.

    Returns:
        The second plan, within the same budget, and the samples that were seen to find it.

    Raises:
        ExportError: when the first plan cannot be merged.
        InfeasibleBudget: when what this ends with does not keep the side constraints.
        TrainingFailed: when the first phase diverges.
    """
    trained = train_first(prepared, study, first, seed=study.seed, folder=folder, splits=("inner",))
    kept, merged = _evidence(prepared, study, trained, share)
    with _weights(prepared.model, merged), thread_count(prepared.threads):
        scores = study.scorer.score(prepared.model, prepared.catalog, prepared.task, study.seed)
    seen = trained.first.epochs * round(study.train.data_fraction * prepared.task.sizes["inner"])
    seen += scores.origin.n_samples + scores.origin.memory_samples
    return _packed(prepared, study, first.allocation, kept, scores), seen


def _evidence(
    prepared: Prepared, study: Study, trained: Trained, share: float
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Option key to the size that is kept, and the merged model."""
    first = trained.first.allocation
    with study.backend.insert(
        prepared.model, prepared.catalog, first, study.methods, seed=study.seed, head=prepared.head
    ) as inserted:
        inserted.load_state(trained.state)
        kept: dict[str, int] = {}
        for option in first:
            adapter, sizes = inserted.named_adapters()[option.key], list[int]()
            if isinstance(adapter, LoRAAdapter | CoreAdapter):
                offered = study.methods[option.method].sizes(prepared.catalog[option.site])
                sizes = [size for size in offered if size < option.size and _nested(study, option)]
            enough = (size for size in sizes if retained(adapter, size) >= share)
            kept[option.key] = next(enough, option.size)
        return kept, inserted.merged_state()


@contextmanager
def _weights(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other values in its tensors, which are given back bit for bit."""
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in state}
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    try:
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        yield
    finally:
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(before[name])


def _packed(prepared: Prepared, study: Study, first: Allocation, kept: Mapping[str, int], scores: Scores) -> Allocation:
    budget, methods, catalog = prepared.budget, study.methods, prepared.catalog
    stay: dict[str, Option] = {}
    for option in first:
        size = kept[option.key]
        cost = option.cost if size == option.size else methods[option.method].cost(catalog[option.site], size)
        stay[option.key] = option if size == option.size else dataclasses.replace(option, size=size, cost=cost)
    left = budget.limit - sum(o.cost.of(budget.unit) for o in stay.values())
    menu = build_menu(catalog, methods, scores, study.gain, fused=study.fused, budget=budget)
    rules = _Rules(prepared, study)
    priced = {o.ident: o for o in menu}
    taken = {place for o in stay.values() for place in o.places}
    offered: list[Option] = []
    for option in menu:
        site = menu.sites[option.site]
        if (study.mergeable and not methods[option.method].mergeable(site)) or not rules.offers(option):
            continue
        now = stay.get(option.key)
        if now is None:
            if not taken & set(option.places):
                offered.append(option)
        elif option.size > now.size and _nested(study, now):
            # A growing adapter is worth the difference: what it holds now has been taken from the gradient already.
            held = priced.get((now.site, now.method, now.size))
            gain, memory = option.gain, option.memory
            if held is not None:
                gain -= held.gain
                memory = memory - held.memory if memory is not None and held.memory is not None else None
            offered.append(dataclasses.replace(option, cost=_more(option.cost, now.cost), gain=gain, memory=memory))
    fits = [o for o in offered if o.cost.of(budget.unit) <= left and o.gain > 0]
    bought: tuple[Option, ...] = ()
    if fits:
        spare = Budget(left, budget.unit)
        bought = Knapsack().allocate(Menu(tuple(fits), menu.sites, scores), spare, study.seed).options
    for option in bought:
        whole = priced[option.ident]
        stay[option.key] = dataclasses.replace(whole, gain=option.gain, memory=option.memory)
    plan = Allocation(tuple(stay.values()), budget, Provenance("repack", scores.origin.scorer))
    if not rules.kept(plan):
        raise InfeasibleBudget("what training has shown leads to a plan that does not keep the side constraints")
    return attach_indices(plan, methods, scores, menu.sites)


class _Rules:
    """The study's side constraints, on what every option costs: what was bought may gain nothing any more."""

    def __init__(self, prepared: Prepared, study: Study) -> None:
        held = study.allocator if isinstance(study.allocator, Knapsack) and is_constrained(study) else None
        self._held = held
        self._menus = limited_menus(prepared, study, every_option(prepared, study)) if held is not None else ()
        self._offered = {o.ident for menu in self._menus for o in held.offered(menu)} if held is not None else set()

    def offers(self, option: Option) -> bool:
        """Whether any plan may have the option."""
        return self._held is None or option.ident in self._offered

    def kept(self, plan: Allocation) -> bool:
        """Whether this plan keeps all of them."""
        return self._held is None or any(self._held.keeps(menu, plan) for menu in self._menus)


def _nested(study: Study, option: Option) -> bool:
    """Whether a smaller size lies in a larger one: LoRA, and square cores between bases that are not the plan's own."""
    method = study.methods[option.method]
    if isinstance(method, Core):
        return method.shape == "square" and option.bases is None and option.indices is None
    return isinstance(method, LoRA)


def _more(whole: Cost, held: Cost) -> Cost:
    """What a larger size costs more."""
    return Cost(
        whole.trainable - held.trainable,
        max(0, whole.stored - held.stored),
        max(0, whole.bits - held.bits),
        max(0, whole.entries - held.entries),
        max(0, whole.tensors - held.tensors),
    )


def _read(folder: Path, winner: Finalist) -> dict[str, Any] | None:
    path = folder / "repack.json"
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = read_json(path)
    except AutopeftError:
        return None
    same = data.get("winner") == winner.allocation.digest and data.get("trial") == winner.trial
    return data if same else None


def _write(folder: Path, winner: Finalist, found: Repacked) -> Repacked:
    second = found.finalist.allocation.digest if found.finalist is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "winner": winner.allocation.digest,
        "trial": winner.trial,
        "second": second,
        "reason": found.reason,
        "sample_epochs": found.sample_epochs,
    }
    write_json(folder / "repack.json", data)
    return found
