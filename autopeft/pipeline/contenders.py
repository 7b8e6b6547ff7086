"""Who competes at one budget: the baselines, and our plan without any search.

A group is one contender with its variants (target modules, ranks, draws). Every group gets the same number of learning
rates from `pipeline.tune`. Contenders are plug-ins: one file in `pipeline/rivals` with a line in its table, or an
entry point of the group `autopeft.contenders`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Backend, Method
from autopeft.core.record import Role
from autopeft.core.registry import Registry
from autopeft.core.scores import Evidence, Scores
from autopeft.errors import InfeasibleBudget
from autopeft.pipeline import rivals
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.targets import is_constrained

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = [
    "CONTENDERS",
    "DEFAULT_CONTENDERS",
    "Candidate",
    "Group",
    "Rival",
    "all_contenders",
    "contender",
    "contender_groups",
    "contender_names",
    "spt_scores",
]

DEFAULT_CONTENDERS = ("head_only", "uniform_lora", "uniform_core", "single_method", "spt_lora", "random_mix")
"""What `default` stands for: what the three minutes of the first run have room for."""

_DEFAULT, _ALL = "default", "all"


@dataclass(frozen=True)
class Candidate:
    """One plan under a name.

    Attributes:
        name: what a person calls it.
        allocation: the plan.
        methods: methods that it needs besides the study's.
        backend: the backend that it needs; the study's when None.
    """

    name: str
    allocation: Allocation
    methods: Mapping[str, Method] = field(default_factory=dict)
    backend: Backend | None = None

    def under(self, study: Study) -> Study:
        """The study with what this plan needs."""
        if not self.methods and self.backend is None:
            return study
        return dataclasses.replace(
            study, methods={**study.methods, **self.methods}, backend=self.backend or study.backend
        )


@dataclass(frozen=True)
class Group:
    """One contender: variants of one idea, of which the best is kept.

    Attributes:
        name: what a person calls it.
        role: `baseline`; `default` for our plan without search; `reference` for what trains more than the budget.
        candidates: the variants; empty when it cannot compete.
        reason: why it cannot; empty when it can.
        note: what has to be said beside its result.
        sample_epochs: samples that its own search has seen, one forward and backward pass each.
    """

    name: str
    role: Role
    candidates: tuple[Candidate, ...]
    reason: str = ""
    note: str = ""
    sample_epochs: int = 0


class Rival(Protocol):
    """A contender.

    Laws: deterministic; within the budget by an independent count unless its role is `reference`; it looks at the
    inner and outer splits alone.
    """

    @property
    def title(self) -> str:
        """What a person calls it."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of methods without which `default` leaves it out; asked for by name, it brings them itself."""
        ...

    def group(self, prepared: Prepared, study: Study) -> Group:
        """Its plans at the budget of `prepared`.

        Raises:
            InfeasibleBudget: when the budget cannot express it, with the reason.
        """
        ...


CONTENDERS: Registry[Rival] = Registry("contender", "autopeft.contenders", rivals.BUILTIN)


def contender_names(asked: Iterable[str]) -> tuple[str, ...]:
    """Names of contenders in the order of the asking, `default` and `all` written out.

    Raises:
        UnknownPlugin: with a guess at the name that was meant.
    """
    names: dict[str, None] = {}
    for name in asked:
        if name == _DEFAULT:
            names |= dict.fromkeys(DEFAULT_CONTENDERS)
        elif name == _ALL:
            names |= dict.fromkeys((*DEFAULT_CONTENDERS, *CONTENDERS))
        else:
            CONTENDERS[name]
            names[name] = None
    return tuple(names)


def contender(name: str, prepared: Prepared, study: Study) -> Group:
    """One contender at the budget of `prepared`, with its methods brought where the study lacks them.

    Args:
        name: its name in the table of `autopeft.pipeline.rivals`, such as `uniform_lora`.
        prepared: model, task, head and scores. Contenders that search (`s3delta`, `prunepeft`) train here and count
            what they have seen in `sample_epochs`; with a run folder they keep the plan that they have found.
        study: methods, training settings and seed.

    Returns:
        The group for `tune`. One that the budget cannot express has no candidates, and says why in `reason`.

    Raises:
        UnknownPlugin: for a name that nobody knows, with a guess.
    """
    rival = CONTENDERS[name]()
    try:
        found = rival.group(prepared, study)
    except InfeasibleBudget as error:
        return Group(rival.title, "baseline", (), str(error))
    distinct: dict[str, Candidate] = {}
    for candidate in found.candidates:
        distinct.setdefault(candidate.allocation.digest, candidate)
    return dataclasses.replace(found, candidates=tuple(distinct.values()))


def all_contenders(prepared: Prepared, study: Study) -> tuple[Group, ...]:
    """Every contender of `search.contenders`, also those that cannot compete, then the default plan."""
    asked = study.search.contenders
    named = {name for name in asked if name not in (_DEFAULT, _ALL)}
    groups = []
    for name in contender_names(asked):
        rival = CONTENDERS[name]()
        lacking = [key for key in rival.needs if key not in study.methods]
        if lacking and name not in named and _ALL not in asked:
            reason = f"the study has no method {lacking[0]!r}; name the contender {name} to have it all the same"
            groups.append(Group(rival.title, "baseline", (), reason))
        else:
            groups.append(_unbound(contender(name, prepared, study), study))
    default = Group("default plan", "default", (Candidate("default plan", make_plan(prepared, study)),))
    return (*groups, default)


def _unbound(group: Group, study: Study) -> Group:
    """A baseline says when it is not held to what our plans are held to."""
    if not group.candidates or not is_constrained(study):
        return group
    note = "for comparison: not held to the side constraints"
    return dataclasses.replace(group, note=f"{group.note}; {note}" if group.note else note)


def contender_groups(prepared: Prepared, study: Study) -> tuple[Group, ...]:
    """The contenders that can compete at this budget, then the default plan."""
    return tuple(group for group in all_contenders(prepared, study) if group.candidates)


def spt_scores(scores: Scores) -> Scores:
    """The same evidence ranked as SPT ranks it, by squared gradients, whatever the study's scorer ranks by."""
    evidence = {
        name: Evidence(
            item.site,
            {
                slot: dataclasses.replace(t, score=t.square if t.square is not None else t.score)
                for slot, t in item.slots.items()
            },
        )
        for name, item in scores.evidence.items()
    }
    return Scores(scores.origin, scores.totals, evidence)
