"""Every error that autopeft raises on purpose, with the exit code the command line ends with.

AutopeftError            1  unexpected; the root of the tree
├── UsageError           2  a wrong flag, key, name or value
│   ├── UnknownKey          a key or knob nobody knows, with a guess at the one that was meant
│   ├── UnknownPlugin       a plug-in name that no registry holds
│   └── UnknownModel        a model specification that leads nowhere
├── InfeasibleBudget     3  the budget buys nothing; carries the cheapest feasible option
├── DataError            4  unreadable, empty, one-class or leaking data
├── MissingDependency    5  an optional package is absent; names the extra
├── StoreError           6  a run folder, storage or study cannot be used
│   ├── RunLocked           another process works in the folder
│   ├── StaleRun            the folder belongs to another study
│   └── CorruptFile         a file of the run cannot be read back
├── TrainingFailed       8  training did not produce a usable model
│   ├── Diverged            the loss became NaN or infinite
│   └── DeadAdapter         an adapter is in the model but receives no gradient
├── Preempted           75  stopped by a signal; safe to run again
├── ExportError          1  an export cannot be represented or does not reproduce the model
└── BudgetMismatch       1  two independent counts of one plan disagree: a bug, never a user's fault
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AutopeftError",
    "BudgetMismatch",
    "CorruptFile",
    "DataError",
    "DeadAdapter",
    "Diverged",
    "ExportError",
    "InfeasibleBudget",
    "MissingDependency",
    "Preempted",
    "RunLocked",
    "StaleRun",
    "StoreError",
    "TrainingFailed",
    "UnknownKey",
    "UnknownModel",
    "UnknownPlugin",
    "UsageError",
]


class AutopeftError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class UsageError(AutopeftError):
    """A flag, key, name or value is wrong."""

    exit_code = 2


class UnknownKey(UsageError):
    """A configuration key or knob that nobody knows."""


class UnknownPlugin(UsageError):
    """A plug-in name that the registry does not hold."""


class UnknownModel(UsageError):
    """A model specification that leads nowhere."""


class InfeasibleBudget(AutopeftError):
    """No plan fits the budget.

    Attributes:
        cheapest: the cost of the cheapest option, in the budget's unit, or None when there is no option at all.
    """

    exit_code = 3

    def __init__(self, message: str, cheapest: int | None = None) -> None:
        super().__init__(message)
        self.cheapest = cheapest


class DataError(AutopeftError):
    """The data set cannot be used as it is."""

    exit_code = 4


class MissingDependency(AutopeftError):
    """An optional package is absent.

    Args:
        package: the import name of the absent package.
        extra: the extra of autopeft that installs it.
        purpose: what it is needed for, as the end of "... is needed to".
    """

    exit_code = 5

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"the package '{package}' is needed to {purpose}, and it is not installed. "
            f"Install it with: pip install 'autopeft[{extra}]'"
        )
        self.package = package
        self.extra = extra


class StoreError(AutopeftError):
    """A run folder, a storage or a study cannot be used."""

    exit_code = 6


class RunLocked(StoreError):
    """Another live process works in the run folder."""


class StaleRun(StoreError):
    """The run folder holds another study than the one asked for."""


class CorruptFile(StoreError):
    """A file of the run is unreadable or does not have the expected content."""


class TrainingFailed(AutopeftError):
    """Training did not produce a usable model."""

    exit_code = 8


class Diverged(TrainingFailed):
    """The loss became NaN or infinite."""


class DeadAdapter(TrainingFailed):
    """An adapter is in the model, is paid for, and receives no gradient."""


class Preempted(AutopeftError):
    """A signal asked the process to stop; everything done is saved and the command can run again."""

    exit_code = 75


class ExportError(AutopeftError):
    """The plan cannot be represented in this format, or the reloaded export gives other logits."""


class BudgetMismatch(AutopeftError):
    """Two independent counts of one plan disagree: always a bug in a method's `cost` or `build`."""
