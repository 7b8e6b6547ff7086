"""DR-Tune: the head also has to classify the frozen model's features, brought to where the trained ones are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.contracts import Inserted, StepState, Task, Term
from autopeft.errors import UsageError
from autopeft.regularisers._calibration import calibrated, rotation
from autopeft.regularisers._changes import exactly
from autopeft.regularisers._draw import generator_at
from autopeft.regularisers._teacher import head_path, look, teacher
from autopeft.regularisers._term import BaseTerm, check_weight

__all__ = ["Between", "Combine", "DRTune"]

Combine = Literal["add", "pool"]
"""How the loss of the bank joins the task's: with a weight of its own, or in one mean over samples and bank."""

Between = Literal["keep", "none"]
"""What rotates the bank in steps that compute no rotation: the last one, or nothing."""


@dataclass(frozen=True, slots=True)
class DRTune:
    """Adds the head's loss on a bank of frozen features, calibrated to the trained ones.

    Zhou et al., 2023, arXiv 2308.12058. Two ring buffers keep, for the last `bank` training samples, the features that
    reach the head in the trained and in the frozen model. In every step the frozen ones are calibrated (section 3.3,
    see `autopeft.regularisers._calibration`): turned by the rotation that brings the one cloud best onto the other,
    shifted class by class, scaled to the length of the batch's features. Their cross-entropy under the current head is
    the term. Calibration has no gradient, so the term trains the head alone, and the head holds the adapters to
    features that still separate what the frozen ones separate. Before the first step both buffers are filled with
    frozen features of training samples.

    The authors' code computes a rotation in every tenth step, uses none in between, and takes one mean over the batch
    and the bank: `rotate_every=10, between="none", combine="pool"`. The paper rotates in every step: `rotate_every=1`.

    It needs a classifier whose head is one Linear layer and batches `(input, labels)`. The buffers hold `2 * bank *
    features` scalars and are part of a checkpoint, not of what is exported. Costs a forward pass more per step, and an
    SVD of (features, features) where a rotation is computed.

    Attributes:
        weight: of the bank's loss; 0 switches it off.
        bank: samples in the buffers; never more than there are training samples.
        rotate_every: steps from one rotation to the next.
        between: `keep` uses the last rotation until there is a new one, `none` uses none, as in the authors' code.
        combine: `add` adds `weight * L_bank`; `pool` adds what turns the loss into `(n L + weight K L_bank) / (n +
            weight K)` for a batch of n and a bank of K, which at a weight of 1 is the mean over both.
    """

    weight: float = 1.0
    bank: int = 2048
    rotate_every: int = 10
    between: Between = "keep"
    combine: Combine = "add"

    def __post_init__(self) -> None:
        check_weight("dr_tune", self.weight)
        for name, number in (("bank", self.bank), ("rotate_every", self.rotate_every)):
            if number < 1:
                raise UsageError(f"dr_tune: {name} must be at least 1, got {number!r}")
        for name, value, known in (
            ("between", self.between, get_args(Between)),
            ("combine", self.combine, get_args(Combine)),
        ):
            if value not in known:
                raise UsageError(f"dr_tune: {name} must be one of {', '.join(known)}, got {value!r}")

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Find the head; the buffers are filled in the first step, when it is known that no checkpoint fills them.

        Raises:
            UsageError: when the head is not one Linear layer with an output per class.
        """
        if not self.weight:
            return BaseTerm()
        path = head_path(inserted)
        head = inserted.model.get_submodule(path)
        if not isinstance(head, nn.Linear) or head.out_features != len(task.classes):
            raise UsageError(
                f"dr_tune needs a head of one Linear layer with {len(task.classes)} outputs; {path} is {head}"
            )
        return _Bank(self, path, head, len(task.classes), min(self.bank, task.sizes["inner"]), seed)


class _Bank(BaseTerm):
    """The buffers: `trained` and `frozen` (K, features), `labels` (K,), the place that is written next, the rotation.

    `turn` is (features, features), or empty before the first rotation.
    """

    def __init__(self, settings: DRTune, path: str, head: nn.Linear, classes: int, size: int, seed: int) -> None:
        self._settings = settings
        self._path = path
        self._head = head
        self._classes = classes
        self._size = size
        self._seed = seed
        self._kept: dict[str, Tensor] = {}

    def add(self, state: StepState) -> Tensor | None:
        """The bank's loss; then the batch takes the place of the oldest samples."""
        features, labels = _rows(state.features, self._head), _labels(state.batch, state.features)
        with teacher(state.inserted) as model:
            frozen = look(state.task, model, state.batch, self._path).features
        assert frozen is not None
        if not self._kept:
            self._fill(state)
        with exactly(features):
            bank = self._calibrated(features.detach(), state.step)
            # The buffers are written to before the backward pass reads the labels.
            labels_then = self._kept["labels"].clone()
            mean: Tensor = F.cross_entropy(self._head(bank.to(self._head.weight.dtype)), labels_then)
        self._put(features.detach(), frozen, labels)
        if self._settings.combine == "add":
            return self._settings.weight * mean
        share = self._settings.weight * self._size / (len(features) + self._settings.weight * self._size)
        return (mean - state.loss) * share

    @torch.no_grad()
    def _calibrated(self, features: Tensor, step: int) -> Tensor:
        kept = self._kept
        trained, frozen = F.normalize(kept["trained"]), F.normalize(kept["frozen"])
        turn: Tensor | None = None
        if step % self._settings.rotate_every == 0:
            turn = kept["turn"] = rotation(frozen, trained)
        elif self._settings.between == "keep" and kept["turn"].numel():
            turn = kept["turn"]
        length: Tensor = torch.linalg.vector_norm(features, dim=1).mean().to(frozen.dtype)
        prototypes = self._head.weight.to(frozen.dtype)
        return calibrated(trained, frozen, kept["labels"], prototypes, turn) * length

    def _fill(self, state: StepState) -> None:
        """Frozen features of training samples in both buffers, as many as there is room for."""
        device, dtype = self._head.weight.device, self._head.weight.dtype
        room = torch.zeros(self._size, self._head.in_features, device=device, dtype=dtype)
        self._kept = {
            "trained": room,
            "frozen": room.clone(),
            "labels": torch.zeros(self._size, dtype=torch.int64, device=device),
            "next": torch.zeros((), dtype=torch.int64),
            "turn": torch.zeros(0, device=device, dtype=dtype),
        }
        seed = int(torch.randint(2**31, (), generator=generator_at(self._seed, -1)))
        left = self._size
        with teacher(state.inserted) as model:
            for batch in state.task.batches("inner", seed):
                found = look(state.task, model, batch, self._path).features
                assert found is not None
                rows = _rows(found, self._head)[:left]
                self._put(rows, rows, _labels(batch, found)[:left])
                left -= len(rows)
                if not left:
                    return

    @torch.no_grad()
    def _put(self, trained: Tensor, frozen: Tensor, labels: Tensor) -> None:
        """Write rows at the next places, the newest in the place of the oldest."""
        start, kept = int(self._kept["next"]), self._kept
        trained, frozen, labels = (rows[-self._size :] for rows in (trained, frozen, labels))
        places = (start + torch.arange(len(labels), device=labels.device)) % self._size
        for name, rows in (("trained", trained), ("frozen", frozen), ("labels", labels)):
            kept[name][places] = rows.to(kept[name].dtype)
        kept["next"].fill_((start + len(labels)) % self._size)

    def state(self) -> dict[str, Tensor]:
        """The buffers; nothing before the first step."""
        return dict(self._kept)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the buffers up.

        Raises:
            UsageError: when they are not of this bank's names and sizes.
        """
        if not state:
            self._kept = {}
            return
        wanted = {"trained", "frozen", "labels", "next", "turn"}
        shape = (self._size, self._head.in_features)
        if set(state) != wanted or state["trained"].shape != shape or state["frozen"].shape != shape:
            raise UsageError(
                f"dr_tune keeps {', '.join(sorted(wanted))} of {shape[0]} samples with {shape[1]} features; the "
                f"checkpoint has {', '.join(f'{n} {tuple(t.shape)}' for n, t in sorted(state.items()))}"
            )
        device = self._head.weight.device
        self._kept = {name: t.to("cpu" if name == "next" else device, copy=True) for name, t in state.items()}


def _rows(features: Tensor, head: nn.Linear) -> Tensor:
    if features.ndim != 2 or features.shape[1] != head.in_features:
        raise UsageError(
            f"dr_tune needs one row of {head.in_features} features per sample in front of the head, "
            f"got {tuple(features.shape)}"
        )
    return features


def _labels(batch: Any, features: Tensor) -> Tensor:
    labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not isinstance(labels, Tensor) or labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise UsageError("dr_tune needs batches (input, labels) with one whole number per sample as the label")
    return labels.to(features.device)
