"""Everything that decides a run, as one frozen value."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from autopeft.allocation.gain import GainPolicy
from autopeft.config._guess import known_names
from autopeft.config.limits import LimitSettings
from autopeft.config.plugin import Plugin, PluginTable
from autopeft.config.registries import METHODS, ROOMS
from autopeft.core.budget import Budget
from autopeft.core.contracts import Allocator, Backend, Method, Regulariser, Reward, Sampler, Scorer, TaskSpec
from autopeft.core.goals import Front, Goals
from autopeft.core.site import Fused
from autopeft.errors import UnknownKey, UsageError
from autopeft.models.spec import ModelSpec
from autopeft.search.race import RaceTest
from autopeft.training.settings import TrainSettings

__all__ = ["DEFAULT_METHODS", "Choose", "DataSettings", "SearchSettings", "Study", "Tier"]

DEFAULT_METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lora": {"type": "lora"},
        "core": {"type": "core"},
        "sparse": {"type": "sparse", "slot": "weight"},
        "sparse_bias": {"type": "sparse", "slot": "bias"},
        "bias": {"type": "bias"},
        "vector": {"type": "vector"},
        "norm": {"type": "norm"},
        "ssf": {"type": "ssf"},
        "adapter": {"type": "adapter"},
        "block_adapter": {"type": "block_adapter"},
        "tokens": {"type": "tokens"},
    }
)
"""The methods of a study that names none, and what each name stands for."""

Tier = Literal["default", "race", "search"]
"""What a search may cost, see `SearchSettings.tier`."""

Choose = Literal["likelihood", "goal"]
"""What decides between candidates, see `SearchSettings.choose`."""

_ACCURACIES = ("top1", "macro_f1")

_LIMITLESS = 10**15
"""Base parameters that no share of a sensible size rounds to nothing of: checks a budget's spelling without a model."""


def _whole(name: str, value: int | None, low: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise UsageError(f"{name} must be a whole number of at least {low}, got {value!r}")


def _fraction(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise UsageError(f"{name} must be at least 0 and below 1, got {value!r}")


def _as_names(value: Any) -> Any:
    """`a,b` and lists are tuples of names."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    return tuple(parts) if isinstance(parts, list) else parts


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Which data, and how it is cut and read.

    Attributes:
        spec: a folder, `torch/NAME`, `hfds/OWNER/NAME`, `csv:FILE` or `digits`.
        batch_size: samples per batch.
        val_frac: share of what there is that becomes the outer split; the task's own rule when None.
        test_frac: share that becomes the test split; the task's own rule when None.
        max_inner: at most this many samples stay in the inner split.
        max_samples: at most this many samples of the source are used.
        workers: threads that decode images; 0 chooses.
        download: whether absent data may be fetched.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    spec: str = "digits"
    batch_size: int = 32
    val_frac: float | None = None
    test_frac: float | None = None
    max_inner: int | None = None
    max_samples: int | None = None
    workers: int = 0
    download: bool = False

    def __post_init__(self) -> None:
        if not self.spec.strip():
            raise UsageError("data.spec is empty; give a folder of images, or digits")
        _whole("data.batch_size", self.batch_size, 1)
        _whole("data.max_inner", self.max_inner, 1)
        _whole("data.max_samples", self.max_samples, 1)
        _whole("data.workers", self.workers, 0)
        _fraction("data.val_frac", self.val_frac)
        _fraction("data.test_frac", self.test_frac)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How long to search, in what, and how sure to be of the result.

    Attributes:
        trials: trials in all, baselines not counted.
        time_limit: seconds for the whole run, None for no limit.
        space: name of a search space, or path of its file.
        seeds: trainings per finalist at the end.
        tries: learning rates per contender in short runs; with more than one, the best and the next larger one are then
            run in full. Every contender and our own plans get the same number.
        sampler: proposes the knobs of the next trial: `tpe`, `random`, `nsga2` (for fronts) or `gp` (few, full trials).
        tier: what the search may cost, in units of one full training and baselines apart: `default` (0.3: the default
            plan at the usual learning rates), `race` (1: a race of known candidates), `search` (4: as many
            trials as that buys, of a third of a training each, and the best in full at two learning rates). None leaves
            it to `trials` and `time_limit`.
        choose: what candidates are compared by on the outer split where the first goal is a classifier's accuracy
            (`top1`, `macro_f1`): `likelihood`, its negative log-likelihood at the best temperature, or `goal`, the
            accuracy itself, which a few hundred samples hardly tell apart. Other goals are compared by themselves.
        race_test: what decides that a candidate of a race is behind: `normal` or `wilcoxon`.
        stop_delta: end the search once no knob setting is likely better than the best by more than this; None for no
            such rule.
        confidence: of that rule, and of the bound in the record.
        warm_start: folders of earlier runs on the same model; their best knob settings are tried first.
        front: what is made of a reward with several goals: `first`, `epsilon`, `pareto`, or `auto`, see
            `autopeft.core.goals.Front`.
        limits: goal to the worst value that is allowed, for the others than the first.
        repack: `auto` tries another plan from a third of the winner's training on, and keeps it when a paired test on
            the outer split says that it is better; not where there is a time limit. `off` never does, until a study
            has measured when it pays: it costs two trainings per seed.
        contenders: whom our plans are compared with at the same budget: names, `default`, `all`, or several of these.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    trials: int = 10
    time_limit: float | None = None
    space: str = "mixed_methods"
    seeds: int = 3
    tries: int = 2
    sampler: Annotated[Sampler, Plugin("search")] = field(default_factory=lambda: _builtin("search", "tpe"))
    tier: Tier | None = None
    choose: Choose = "likelihood"
    race_test: RaceTest = "normal"
    stop_delta: float | None = None
    confidence: float = 0.9
    warm_start: tuple[str, ...] = ()
    front: Front = "auto"
    limits: Mapping[str, float] = field(default_factory=dict)
    repack: Literal["auto", "off"] = "off"
    contenders: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = ("default",)

    def __post_init__(self) -> None:
        _whole("search.trials", self.trials, 0)
        _whole("search.seeds", self.seeds, 1)
        _whole("search.tries", self.tries, 1)
        if self.time_limit is not None and not self.time_limit > 0:
            raise UsageError(f"search.time_limit must be more than 0 seconds, got {self.time_limit!r}")
        if self.repack not in ("auto", "off"):
            raise UsageError(f"search.repack must be auto or off, got {self.repack!r}")
        if not self.contenders or not all(name.strip() for name in self.contenders):
            raise UsageError("search.contenders is empty; write default, all, or names such as uniform_lora")
        if self.stop_delta is not None and not self.stop_delta >= 0:
            raise UsageError(f"search.stop_delta must be at least 0, got {self.stop_delta!r}")
        if not 0 < self.confidence < 1:
            raise UsageError(f"search.confidence must lie between 0 and 1, got {self.confidence!r}")
        for name, kinds in (("tier", Tier), ("choose", Choose), ("race_test", RaceTest)):
            if getattr(self, name) is not None and getattr(self, name) not in typing.get_args(kinds):
                known = ", ".join(typing.get_args(kinds))
                raise UsageError(f"search.{name} must be one of {known}, got {getattr(self, name)!r}")
        if not self.space.strip():
            raise UsageError("search.space is empty; give the name of a search space, or the path of its file")


def _as_text(value: Any) -> Any:
    """A budget of 1198 is a number in YAML; as a value it is text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _builtin(room: str, name: str) -> Any:
    return ROOMS[room][name]()


def _default_methods() -> dict[str, Method]:
    return PluginTable("methods", DEFAULT_METHODS).read(list(DEFAULT_METHODS))


@dataclass(frozen=True, slots=True)
class Study:
    """A run before it begins. Equal studies on equal software and machines give equal runs.

    Attributes:
        model: the pre-trained model.
        data: the data set and its splits.
        task: the kind of task.
        budget: how much may be trained, as a person writes it: `0.1%`, `86k`, `500KB`, `like:lora-r8`.
        fused: whether fused projections are offered whole, sliced, or both.
        methods: name to method; names are what plans and reports speak of.
        scorer: how sensitivity is measured.
        allocator: how the budget is spent.
        spend: share of the budget that plans may spend, in (0, 1]; a knob for searches of a front.
        mergeable: whether to offer only what can be merged into the model's own tensors, so that every plan leaves as a
            plain checkpoint; off also offers bottleneck adapters.
        limits: the format that every plan must be able to leave in, and caps on FLOPs and memory.
        gain: corrections to the predicted gains; most knobs lie here.
        backend: how adapters are inserted.
        train: the inner loop.
        regularisers: name to what shapes training besides the task's loss; none by default. Setting something of one,
            `regularisers.distillation.weight=0.5`, is enough to add it.
        reward: what is maximised.
        search: the outer loop.
        head_warmup: whether a ridge probe sets the head first, one head for all arms; off is SPT as released.
        device: `auto`, `cpu`, `cuda` or `cuda:0`.
        seed: of splits, initialisation, order and search.
        version: of the format of study files.

    Raises:
        UnknownKey: for a gain multiplier of a method that does not exist.
        UsageError: naming the field and the value that is out of range.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSettings = field(default_factory=DataSettings)
    task: Annotated[TaskSpec, Plugin("tasks")] = field(default_factory=lambda: _builtin("tasks", "classification"))
    budget: Annotated[str, BeforeValidator(_as_text)] = "0.1%"
    fused: Fused = "whole"
    methods: Annotated[Mapping[str, Method], PluginTable("methods", DEFAULT_METHODS)] = field(
        default_factory=_default_methods
    )
    scorer: Annotated[Scorer, Plugin("scoring")] = field(default_factory=lambda: _builtin("scoring", "fisher"))
    allocator: Annotated[Allocator, Plugin("allocation")] = field(
        default_factory=lambda: _builtin("allocation", "knapsack")
    )
    spend: float = 1.0
    mergeable: bool = True
    limits: LimitSettings = field(default_factory=LimitSettings)
    gain: GainPolicy = field(default_factory=GainPolicy)
    backend: Annotated[Backend, Plugin("backends")] = field(default_factory=lambda: _builtin("backends", "native"))
    train: TrainSettings = field(default_factory=TrainSettings)
    regularisers: Annotated[Mapping[str, Regulariser], PluginTable("regularisers", grows=True)] = field(
        default_factory=dict
    )
    reward: Annotated[Reward, Plugin("rewards")] = field(default_factory=lambda: _builtin("rewards", "metric"))
    search: SearchSettings = field(default_factory=SearchSettings)
    head_warmup: bool = True
    device: str = "auto"
    seed: int = 0
    version: int = 1

    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.version != self.VERSION:
            raise UsageError(
                f"the study is written in version {self.version!r} of the format, this autopeft reads {self.VERSION}"
            )
        _whole("seed", self.seed, 0)
        if self.fused not in typing.get_args(Fused):
            raise UsageError(f"fused must be one of {', '.join(typing.get_args(Fused))}, got {self.fused!r}")
        if not 0 < self.spend <= 1:
            raise UsageError(f"spend must be above 0 and at most 1, got {self.spend!r}")
        if not self.device.strip():
            raise UsageError("device is empty; write auto, cpu, cuda or cuda:0")
        if not self.methods:
            raise UsageError("methods is empty; name at least one method")
        if not self.budget.startswith("like:"):
            Budget.parse(self.budget, _LIMITLESS)
        self.goals  # noqa: B018 - goals and limits that do not fit each other are refused now
        known = [*self.methods, *DEFAULT_METHODS, *METHODS]
        for name in self.gain.methods:
            if name not in known:
                raise UnknownKey(f"gain.methods has no method {name!r}. {known_names(name, dict.fromkeys(known))}")

    @property
    def goals(self) -> Goals:
        """The goals of the reward, and what the search makes of them."""
        return Goals(self.reward.names, self.reward.goals, self.search.front, self.search.limits)

    @property
    def chosen_by(self) -> str:
        """The metric that candidates are compared by on the outer split; see `SearchSettings.choose`."""
        first = self.reward.names[0]
        accuracy = first in _ACCURACIES and self.goals.mode != "pareto"
        return "scaled_nll" if accuracy and self.search.choose == "likelihood" else first

    @classmethod
    def plugins_in(cls, name: str) -> Mapping[str, Plugin]:
        """The fields that hold a plug-in inside of a part, such as `sampler` of `search`; none in most."""
        return _nested()[name]

    @classmethod
    def marker(cls, name: str) -> Plugin | PluginTable | None:
        """How a field holds plug-ins; None for a field that holds none."""
        return _markers()[name]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields' names, in order."""
        return tuple(f.name for f in dataclasses.fields(cls))


@functools.cache
def _nested() -> dict[str, dict[str, Plugin]]:
    found: dict[str, dict[str, Plugin]] = {}
    for name, part in typing.get_type_hints(Study).items():
        hints = typing.get_type_hints(part, include_extras=True) if dataclasses.is_dataclass(part) else {}
        marks = {key: getattr(hint, "__metadata__", ()) for key, hint in hints.items()}
        found[name] = {key: m for key, ms in marks.items() for m in ms if isinstance(m, Plugin)}
    return found


@functools.cache
def _markers() -> dict[str, Plugin | PluginTable | None]:
    hints = typing.get_type_hints(Study, include_extras=True)
    marks = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(Study)}
    return {
        name: next((m for m in found if isinstance(m, Plugin | PluginTable)), None) for name, found in marks.items()
    }
