"""Everything a plan or a trial needs, loaded and measured once."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.allocation.energies import Energies, energies
from autopeft.core.budget import Budget
from autopeft.core.cap import Cap
from autopeft.core.contracts import Task
from autopeft.core.scores import ScoreOrigin, Scores
from autopeft.core.site import Catalog
from autopeft.errors import AutopeftError, UsageError
from autopeft.export.folder import Folder
from autopeft.models.load import LoadedModel, load_model
from autopeft.pipeline.bases import asked_bases, measure_bases, with_bases
from autopeft.pipeline.budget import resolve_budget
from autopeft.pipeline.device import choose_device
from autopeft.scoring.files import load_scores, save_scores
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.reweigh import reweighed
from autopeft.training.probe import Probe, ridge_probe
from autopeft.training.threads import choose_threads, thread_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from autopeft.config.study import Study

__all__ = ["Prepared", "prepare"]

_log = logging.getLogger("autopeft.pipeline")


@dataclass(eq=False)
class Prepared:
    """A loaded model, its catalogue, its task, its head and its scores, shared by every plan and trial of a study.

    Attributes:
        study: the study it was prepared for.
        loaded: the model with its preprocessing and provenance.
        catalog: the model's sites.
        task: the opened data.
        budget: the resolved limit.
        device: where the model lies.
        threads: CPU threads that trials use.
        head: state dict entries the trainable head of every arm starts from.
        probe: the ridge probe behind `head`, None when the head is not warmed up.
        seconds: wall time per stage.
        sample_epochs: samples the scorer has seen.
        basis_samples: samples seen while bases were measured, each as often as it was seen.
        folders: what is known of which options a PEFT folder can hold.
        usage: FLOPs and bytes of a training step by option, per set of methods.
    """

    study: Study
    loaded: LoadedModel
    catalog: Catalog
    task: Task
    budget: Budget
    device: torch.device
    threads: int
    head: Mapping[str, Tensor]
    probe: Probe | None
    folder: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    sample_epochs: int = 0
    basis_samples: int = 0
    folders: dict[tuple[Any, ...], Folder] = field(default_factory=dict)
    usage: dict[tuple[Any, ...], tuple[Cap, Cap]] = field(default_factory=dict)
    _scores: Scores | None = None
    _energies: dict[tuple[str, ...], Energies] = field(default_factory=dict)
    _bases: dict[str, int] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The pre-trained model with the warmed-up head."""
        return self.loaded.model

    @property
    def origin(self) -> ScoreOrigin:
        """What scores made here belong to."""
        return ScoreOrigin(
            scorer=repr(self.study.scorer),
            n_samples=0,
            catalog=self.catalog.fingerprint,
            weights=self.loaded.weights_hash,
            head=_hash_tensors(self.head),
            data=self.task.data_hash,
        )

    @property
    def scores(self) -> Scores:
        """The scores: read from the run folder when they belong to this model, head and data, else measured."""
        if self._scores is None:
            self._scores = self._load_scores() or self._measure_scores()
        return self._scores

    def scores_for(self, study: Study) -> Scores:
        """The scores, with the bases that a study's methods ask for among the evidence; each is measured once.

        Raises:
            UsageError: for bases that nobody knows how to measure.
        """
        for name, rank in asked_bases(study.methods).items():
            if rank > self._bases.get(name, 0):
                found = measure_bases(self, name, rank)
                self._scores = with_bases(self.scores, name, found)
                self._bases[name] = rank
                self.basis_samples += found.samples
        return self.scores

    def scores_by(self, study: Study) -> Scores:
        """As `scores_for`, as the study's own scorer would have given them from the same pass over the data.

        Raises:
            UsageError: when that cannot be had without another pass.
        """
        own, scorer, scores = self.study.scorer, study.scorer, self.scores_for(study)
        if scorer == own:
            return scores
        if not (isinstance(own, Fisher) and isinstance(scorer, Fisher)):
            raise UsageError(f"the model was scored by {own}; {scorer} would need a pass of its own, so it is no knob")
        return reweighed(scores, self.catalog, own, scorer)

    def energies(self, study: Study, budget: Budget | None = None) -> Energies:
        """Uncorrected gains of every option, computed once per set of methods."""
        budget = budget or self.budget
        settings = (study.fused, budget.unit, str(budget.limit), str(study.mergeable), *study.gain.tangent)
        key = (repr(sorted(study.methods.items())), repr(study.scorer), *settings)
        if key not in self._energies:
            scores, start = self.scores_by(study), time.perf_counter()
            with thread_count(self.threads):
                self._energies[key] = energies(
                    self.catalog,
                    study.methods,
                    scores,
                    fused=study.fused,
                    budget=budget,
                    mergeable=study.mergeable,
                    tangent=study.gain.tangent,
                )
            self.seconds["gains"] = self.seconds.get("gains", 0.0) + time.perf_counter() - start
        return self._energies[key]

    def _load_scores(self) -> Scores | None:
        if self.folder is None or not self.folder.exists():
            return None
        try:
            scores = load_scores(self.folder, self.catalog)
            scores.check(self.origin)
        except AutopeftError as error:
            _log.warning("scores in %s are measured again: %s", self.folder, error)
            return None
        return scores if scores.origin.scorer == self.origin.scorer else None

    def _measure_scores(self) -> Scores:
        start = time.perf_counter()
        with thread_count(self.threads):
            found = self.study.scorer.score(self.model, self.catalog, self.task, self.study.seed)
        elapsed = time.perf_counter() - start
        self.seconds["scores"] = elapsed
        own = found.origin
        self.sample_epochs += own.n_samples + own.memory_samples
        origin = dataclasses.replace(
            self.origin,
            n_samples=own.n_samples,
            seconds=round(elapsed, 3),
            memory=own.memory,
            memory_samples=own.memory_samples,
        )
        scores = Scores(origin, found.totals, found.evidence)
        if self.folder is not None:
            save_scores(scores, self.folder)
        return scores


def prepare(study: Study, run: Path | None = None, options: Mapping[str, Any] | None = None) -> Prepared:
    """Load the model and the data of a study, warm its head up and resolve its budget.

    Args:
        study: the resolved study.
        run: the run folder, where splits and scores are kept; None keeps nothing.
        options: further options for the task, such as `unseal_token`.

    Returns:
        The model lies on the study's device, in evaluation mode, with the head that every arm starts from.
    """
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    device = choose_device(study.device)
    loaded = load_model(study.model)
    seconds["model"] = time.perf_counter() - start

    start = time.perf_counter()
    data = {f.name: getattr(study.data, f.name) for f in dataclasses.fields(study.data) if f.name != "spec"}
    task = study.task.open(study.data.spec, loaded.data_config, run, study.seed, {**data, **(options or {})})
    seconds["data"] = time.perf_counter() - start

    catalog = loaded.reset_head(len(task.classes), study.seed)
    budget = resolve_budget(study.budget, catalog, study.methods)
    model = loaded.model.to(device)
    threads = study.train.threads or choose_threads(catalog.n_base)

    probe: Probe | None = None
    if study.head_warmup:
        start = time.perf_counter()
        with thread_count(threads):
            probe = ridge_probe(model, catalog, task, device=device, seed=study.seed)
        _load_head(model, probe.state)
        seconds["probe"] = time.perf_counter() - start
    head = _head_state(model, catalog)
    return Prepared(
        study,
        loaded,
        catalog,
        task,
        budget,
        device,
        threads,
        head,
        probe,
        run / "scores" if run is not None else None,
        seconds,
    )


def _load_head(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, value in state.items():
        own[name].data.copy_(value)


def _head_state(model: nn.Module, catalog: Catalog) -> dict[str, Tensor]:
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if any(name.startswith(f"{module}.") for module in catalog.head)
    }


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
