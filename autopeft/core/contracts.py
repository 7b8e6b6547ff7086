"""One protocol per plug-in point, with the laws that every plug-in keeps.

A plug-in is a frozen dataclass: its fields are its hyper-parameters, its methods are its behaviour. It holds no loaded
data. `autopeft.testing` ships the laws as test classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from autopeft.core.allocation import Allocation
from autopeft.core.bases import Bases
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Indices, Menu, Option
from autopeft.core.outcome import Outcome, Split
from autopeft.core.record import Record
from autopeft.core.scores import Evidence, Scores
from autopeft.core.site import Catalog, Site, Slot
from autopeft.core.space import Space, Value

if TYPE_CHECKING:
    import torch
    from optuna.samplers import BaseSampler
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial
    from torch import Tensor, nn

__all__ = [
    "Allocator",
    "Backend",
    "BasedMethod",
    "Competition",
    "Exporter",
    "GroupMethod",
    "Inserted",
    "Judging",
    "Method",
    "Recalling",
    "Regulariser",
    "Reward",
    "Sampler",
    "Scorer",
    "Searcher",
    "StepState",
    "Suggestion",
    "Task",
    "TaskSpec",
    "Term",
]


class Task(Protocol):
    """A data set ready to train and evaluate on.

    Laws: splits are disjoint; the same split and seed give the same batches; evaluating leaves mode and weights alone;
    the test split gives nothing before `unseal_test`, and `unseal_test` works once per run folder.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Samples per split."""
        ...

    @property
    def data_hash(self) -> str:
        """Hash of the samples and the splits."""
        ...

    def batches(self, split: Split, seed: int | None = None, batch_size: int | None = None) -> Iterable[Any]:
        """Batches of a split: shuffled (and augmented, on `inner`) by `seed`; in file order without one.

        Args:
            split: the split.
            seed: seed of order and augmentation; None for evaluation order and no augmentation.
            batch_size: samples per batch; the task's own when None.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, a finite scalar with gradient."""
        ...

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of every sample, shape (batch,)."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> Mapping[str, float]:
        """Metrics of the model on a split, in evaluation mode; mode, weights and random state are left as found."""
        ...

    def predict(self, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
        """Logits of shape (n, classes) and labels of shape (n,), on the CPU, in evaluation mode."""
        ...

    def unseal_test(self) -> None:
        """Open the test split; raises the second time, also in another process."""
        ...


@runtime_checkable
class Judging(Protocol):
    """A task that is no classification: it says itself how well each sample is done.

    Laws: the metrics are those of `evaluate`; the same model and split give the same numbers.
    """

    def judge(self, model: nn.Module, split: Split) -> tuple[Mapping[str, float], Tensor]:
        """Metrics, and a merit of every sample, higher is better: float64 (n,), whose mean is the first metric.

        The mean may have the metric's sign turned, where less of it is better.
        """
        ...


@runtime_checkable
class Recalling(Protocol):
    """A task that measures what a model has memorised of its training samples in a way that has a gradient.

    Laws: only the inner split is looked at; the batches are the same at every call, and nothing is drawn while one is
    measured.
    """

    def recall_batches(self, batch_size: int) -> Iterable[Any]:
        """The batches that are measured, of so many samples; the last may have fewer.

        Raises:
            UsageError: when there is nothing to measure on.
        """
        ...

    def recall(self, model: nn.Module, batch: Any) -> Tensor:
        """How much of a batch is memorised, its samples' mean: a finite scalar with gradient; more is worse."""
        ...


class TaskSpec(Protocol):
    """A kind of task: how to open data as a `Task`.

    A class attribute `DEFAULTS`, plain data of a study, says what a study of this task is unless it says otherwise.
    """

    def open(
        self, data: str, data_config: Mapping[str, Any], folder: Path | None, seed: int, options: Mapping[str, Any]
    ) -> Task:
        """Open a data specification.

        Args:
            data: the specification: a folder, `torch/...`, `hfds/...`, `csv:...`, `digits`.
            data_config: the model's preprocessing, as `timm.data.resolve_model_data_config` gives it.
            folder: the run folder: splits are written there and read back; None writes nothing.
            seed: seed of the split.
            options: `batch_size`, `val_frac`, `test_frac`, `max_samples`, `workers`, `download` and the like.
        """
        ...


class Scorer(Protocol):
    """Measures how sensitive or important each parameter is for a task.

    Laws: weights, gradients, flags, mode and random state are as before; permuting the sites permutes the scores; a
    scorer never trains.
    """

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every place of the catalogue on the task's inner split."""
        ...


class Method(Protocol):
    """A kind of trainable part.

    Laws: identity at step 0, or documented; the built parameters number exactly `cost`; no gradient is None at step 1
    and none is zero by step 2; merged equals unmerged, and `mergeable` says where it merges; saved and loaded into a
    fresh base, the same output; only the claimed places change.
    """

    @property
    def family(self) -> str:
        """Which learning rate it takes: `matrix`, `core`, `entries`, `vector`, `adapter`, `tokens`."""
        ...

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """The slots it occupies on this site; empty when it cannot be used there."""
        ...

    def sizes(self, site: Site) -> tuple[int, ...]:
        """The sizes worth offering on this site, increasing; every size up to the largest may be asked for."""
        ...

    def cost(self, site: Site, size: int) -> Cost:
        """The exact price of one size on this site."""
        ...

    def mergeable(self, site: Site) -> bool:
        """Whether what it builds on this site can be merged into the model's own tensors, known without building."""
        ...

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> nn.Module:
        """The trainable part, an `autopeft.methods.base.Adapter`, on the host's device and in float32.

        Args:
            site: where.
            option: which size, and which entries for sparse methods.
            host: the module it goes on, unchanged.
            generator: CPU generator; the only source of randomness.
        """
        ...

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Predicted first-order decrease of the loss for each size: captured energy of the evidence's signal."""
        ...

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """The entries a sparse option of this size trains; None for methods that train no chosen entries."""
        ...


@runtime_checkable
class BasedMethod(Method, Protocol):
    """A method whose change lies between frozen bases, some of which may come from data.

    Laws: those of `Method`; bases that are neither computed again from the weight nor drawn from a seed are counted as
    stored, and a plan carries them.
    """

    @property
    def measured(self) -> Mapping[str, int]:
        """Names of the bases that it needs measured, with the most directions that it takes of each; mostly empty.

        They are the keys of `TensorEvidence.bases`.
        """
        ...

    def bases(self, site: Site, evidence: Evidence, size: int, indices: Indices | None) -> Bases | None:
        """The bases that a plan must carry for this option; None where `build` computes them again."""
        ...


@runtime_checkable
class GroupMethod(Method, Protocol):
    """A method that changes several sites with shared parameters; its sites are groups, `build` is given the model.

    Laws: those of `Method`; shared parameters are counted once.
    """

    def parts(self, site: Site) -> tuple[tuple[Site, tuple[Slot, ...]], ...]:
        """The members of a group that it changes, each with the slots it occupies there; empty when it cannot."""
        ...


@runtime_checkable
class Competition(Protocol):
    """What a group's method builds when its members win and lose shares of one budget while they train.

    Laws: `spent` is `start` until the first competition, never more than the schedule allows after it, and exactly
    `end` once the last step has begun; who holds what is part of the saved state; the number of trained scalars does
    not change.
    """

    @property
    def start(self) -> int:
        """The budget at the start."""
        ...

    @property
    def end(self) -> int:
        """The budget at the end, not more than at the start."""
        ...

    @property
    def unit(self) -> str:
        """What is shared: `entries` of the change, `ranks`."""
        ...

    @property
    def spent(self) -> int:
        """What the members hold together now."""
        ...

    def shares(self) -> Mapping[str, int]:
        """Name of each member to what it holds now."""
        ...


class Allocator(Protocol):
    """A way to spend a budget on a menu.

    Laws: within budget; deterministic; blind to the order of the menu; exact ones equal brute force.
    """

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        """Choose options.

        Raises:
            InfeasibleBudget: when the budget buys nothing on a menu that is not empty (allocators that buy nothing on
                purpose, such as head only, return an empty allocation).
        """
        ...


class Inserted(Protocol):
    """A model with adapters in it, as `Backend.insert` yields it."""

    @property
    def model(self) -> nn.Module:
        """The borrowed model; calling it runs the adapters."""
        ...

    @property
    def allocation(self) -> Allocation:
        """The plan that was inserted."""
        ...

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Trainable parameters per method key, and the head's under `head`."""
        ...

    def named_adapters(self) -> Mapping[str, nn.Module]:
        """Option key (`site/method`) to adapter."""
        ...

    def trainable_count(self) -> int:
        """Trainable scalars found by walking the model, the head's not counted: independent of the options' costs."""
        ...

    def train_mode(self, mode: bool = True) -> None:
        """Set training or evaluation mode; BatchNorm statistics stay frozen unless the backend was asked otherwise."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Adapter and head tensors on the CPU, by stable names.

        `adapter/SITE/METHOD/NAME` for trained tensors, `buffer/SITE/METHOD/NAME` for tensors that must be stored but
        are not trained, `head/NAME` for the head.
        """
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` gave; missing, unknown or misshapen tensors raise."""
        ...

    def stored(self) -> dict[str, Tensor]:
        """What the exported file holds, named as in `state`: methods with codes of their own pack their tensors."""
        ...

    def load_stored(self, state: Mapping[str, Tensor]) -> None:
        """Load what `stored` gave; missing, unknown or misshapen tensors raise."""
        ...

    def prepare(self, task: Task, seed: int) -> None:
        """Set parameters that start from the data, before the first step; the inner split alone may be looked at."""
        ...

    def advance(self, step: int, total: int) -> list[nn.Parameter]:
        """Tell the adapters that a training step begins.

        Args:
            step: steps taken so far.
            total: steps of the whole schedule.

        Returns:
            The parameters whose optimizer state must be dropped, because they have become something else.
        """
        ...

    def penalty(self) -> Tensor | None:
        """The sum of the terms that the adapters themselves add to the loss; None when there is none."""
        ...

    def plain(self) -> AbstractContextManager[nn.Module]:
        """The model as it was before training, for teachers: adapters inactive, the head as it started, no gradients.

        Laws: inside, the outputs are those of the plain model with the starting head; after it, nothing has changed.
        """
        ...

    def merged_state(self) -> dict[str, Tensor]:
        """Full state dict of the plain model with every adapter merged and the trained head in place.

        Raises:
            ExportError: naming the options that cannot be merged.
        """
        ...


class Backend(Protocol):
    """A way to put adapters into a model.

    Laws: exit restores the same tensors, ids, key order, classes, instance `__dict__`, buffers, flags and mode, also
    after an exception; a second insertion inside the first is refused.
    """

    def insert(
        self,
        model: nn.Module,
        catalog: Catalog,
        allocation: Allocation,
        methods: Mapping[str, Method],
        seed: int = 0,
        head: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[Inserted]:
        """Borrow the model: freeze it, insert the plan's adapters and a trainable copy of the head.

        Args:
            model: the pre-trained model, on its device.
            catalog: its catalogue.
            allocation: the plan.
            methods: method key to method.
            seed: seed of the adapters' initialisation; each option draws from its own stream, so that the same option
                starts alike in every plan.
            head: state dict entries (`head.weight`, ...) the trainable head starts from; its own values when None.
        """
        ...


class StepState(Protocol):
    """What a regulariser is shown of one training step."""

    @property
    def inserted(self) -> Inserted:
        """The model with adapters."""
        ...

    @property
    def task(self) -> Task:
        """The task."""
        ...

    @property
    def batch(self) -> Any:
        """The batch of this step."""
        ...

    @property
    def loss(self) -> Tensor:
        """The task's loss of the batch, with its graph."""
        ...

    @property
    def logits(self) -> Tensor:
        """What the model returned for the batch, with its graph."""
        ...

    @property
    def features(self) -> Tensor:
        """The input of the head in the same pass, with its graph."""
        ...

    @property
    def step(self) -> int:
        """Steps taken so far."""
        ...

    @property
    def total(self) -> int:
        """Steps of the whole schedule."""
        ...


class Term(Protocol):
    """A regulariser at work in one training."""

    def add(self, state: StepState) -> Tensor | None:
        """What is added to the loss of this step, weight included; None adds nothing."""
        ...

    def adjust(self, state: StepState) -> None:
        """Change the gradients in place, after the backward pass and before clipping."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that must survive a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        ...


class Regulariser(Protocol):
    """Something that shapes training besides the loss: a term added to it, or a change of its gradients.

    Laws: with a weight of 0 training is bit for bit the same; the added term has a finite gradient and leaves model,
    mode and flags as found; the same seed gives the same terms; a term restored from its state goes on alike.
    """

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Start it for one training.

        Args:
            inserted: the model with adapters, on its device, before the first step.
            task: the task.
            seed: seed of whatever it draws.
        """
        ...


class Reward(Protocol):
    """Turns an outcome into numbers for the outer loop.

    Laws: `value` is pure and finite; one number per goal.
    """

    @property
    def goals(self) -> tuple[str, ...]:
        """`maximize` or `minimize`, one per number."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers are called, such as `top1`."""
        ...

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        """Metrics this reward needs beyond the task's own; merged into the outcome's metrics."""
        ...

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        """The rewards of an outcome that is done."""
        ...


class Suggestion(Protocol):
    """One trial that a searcher asks for."""

    @property
    def number(self) -> int:
        """Number of the trial in the study."""
        ...

    @property
    def values(self) -> Mapping[str, Value]:
        """Every knob of the space with its value."""
        ...


class Searcher(Protocol):
    """An outer loop over knobs.

    Laws: suggestions lie inside the space; one worker with the same seed and history asks the same next, also after a
    kill and reopening.
    """

    def ask(self, fixed: Mapping[str, Value] | None = None) -> Suggestion:
        """The next trial; `fixed` pins knobs."""
        ...

    def report(self, number: int, step: int, value: float) -> bool:
        """Report an intermediate value; True when the trial should stop."""
        ...

    def tell(self, number: int, outcome: Outcome, rewards: tuple[float, ...]) -> None:
        """Finish a trial."""
        ...

    @property
    def space(self) -> Space:
        """The knobs."""
        ...


class Sampler(Protocol):
    """Proposes the knobs of the next trial, as a function of seed and history.

    Laws: those of the searcher that uses it (`autopeft.testing.searcher_laws`).
    """

    @property
    def prunes(self) -> bool:
        """Whether it learns from trials that were stopped early; where not, none is."""
        ...

    def make(self, seed: int) -> BaseSampler:
        """A fresh sampler of Optuna's with this seed; one is made for every trial."""
        ...

    def view(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
        """The history as that sampler should see it, in the order of the trials; the trials given are not changed."""
        ...


class Exporter(Protocol):
    """A format that a trained plan leaves in.

    Laws: the export, reloaded in a process where importing autopeft raises, gives the same logits.
    """

    def supports(self, inserted: Inserted) -> str:
        """Empty when the plan can be represented in this format, else the reason why not."""
        ...

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the export and return the paths of what was written."""
        ...
