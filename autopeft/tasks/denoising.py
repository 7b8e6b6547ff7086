"""A diffusion task with its data opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from autopeft.core.outcome import Split
from autopeft.errors import Diverged, UsageError
from autopeft.tasks._denoise import denoise, label_rows
from autopeft.tasks._difference import difference, drawn, drawn_pairs
from autopeft.tasks._labelled import LabelledTask, Row, device_of, evaluating
from autopeft.tasks._latents import Autoencoder
from autopeft.tasks._noise import Schedule, fixed_draws

if TYPE_CHECKING:
    from autopeft.tasks.diffusion import Diffusion

__all__ = ["METRIC", "DenoisingBatch", "DenoisingTask", "Images"]

METRIC = "denoising_loss"
"""What the task's metric is called."""

_RECALL_DRAWS = 4
"""Draws per image that `recall` is measured at: those of the reward `noise_difference` unless it is told others."""


class DenoisingBatch(NamedTuple):
    """What the losses of a diffusion task take: nothing is drawn after a batch is made.

    Attributes:
        images: what is denoised, images in [-1, 1] or latents: float32 (b, C, H, W).
        labels: classes, int64 (b,); the number of classes stands for none.
        noise: float32 (b, C, H, W).
        timesteps: int64 (b,).
        text: encoded captions (b, length, width), where the model takes some.
        weight: weights of the squared error, (b, 1, H, W): masks and prior images; None for 1 everywhere.
    """

    images: Tensor
    labels: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor | None = None
    weight: Tensor | None = None


@dataclass(slots=True)
class Images:
    """The samples of one split.

    Attributes:
        names: what each is called.
        pixels: images in [-1, 1], (n, channels, height, width).
        latents: what is denoised instead of the pixels, where there is an autoencoder.
        text: row of each sample in the table of encoded captions.
        weight: weights of the loss, (n, 1, H, W), where there are masks or prior images.
    """

    names: tuple[str, ...]
    pixels: Tensor
    latents: Tensor | None = None
    text: Tensor | None = None
    weight: Tensor | None = None

    @property
    def denoised(self) -> Tensor:
        """What the model denoises."""
        return self.pixels if self.latents is None else self.latents


class DenoisingTask(LabelledTask):
    """Learning to take noise off images; satisfies `autopeft.core.contracts.Task` and `Judging`.

    What rewards may ask of it, beside the contract:

    - `sample(model, n, seed, labels=None) -> Tensor (n, C, H, W) in [-1, 1]`: DDIM, deterministic;
    - `noise_difference(model, rows=None, draws=4, seed=0) -> Tensor (n, draws)`: how much the condition moves the
      predicted noise of training images, at fixed draws;
    - `recall_batches`, `recall`: the same squared, with gradient (`autopeft.core.contracts.Recalling`);
    - `training_images() -> Tensor (n, C, H, W)` and `training_labels()`: each image of inner once, the planted ones
      too; `planted` are their rows, each shown `repeat` times in an epoch;
    - `conditions(rows)`: what the model is told of some of them, as `sample` takes it;
    - `images(split)`: the images of a split, sealed as the split is.

    Args:
        spec: the task's settings.
        schedule: the noise schedule.
        classes: class names in label order; one when images have none.
        labels: labels of each split, without repetitions.
        images: the samples of each split.
        planted: rows of inner that are repeated.
        repeat: how often each is shown in an epoch.
        texts: encoded captions, the empty one last; None when the model takes none.
        autoencoder: from latents to images, where there is one.
        digest: hash of the samples and the splits.
        data_config: the preprocessing that the images were read with, for opening other data alike.
        batch_size: samples per batch.
        folder: the run folder.
        token: see `Seal`.
    """

    def __init__(
        self,
        spec: Diffusion,
        schedule: Schedule,
        classes: tuple[str, ...],
        labels: Mapping[Split, Sequence[int]],
        images: Mapping[Split, Images],
        *,
        planted: tuple[int, ...] = (),
        repeat: int = 1,
        texts: Tensor | None = None,
        autoencoder: Autoencoder | None = None,
        digest: str = "",
        data_config: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        folder: Path | None = None,
        token: str | None = None,
    ) -> None:
        self._shown = [*range(len(labels["inner"])), *(row for row in planted for _ in range(repeat - 1))]
        repeated: dict[Split, Sequence[int]] = {**labels, "inner": [labels["inner"][i] for i in self._shown]}
        super().__init__(classes, repeated, batch_size, folder=folder, token=token)
        self.spec = spec
        self.schedule = schedule
        self.planted = planted
        self.repeat = repeat
        self.data_config = data_config
        self._images = images
        self._texts = texts
        self._autoencoder = autoencoder
        facts = (digest, planted, repeat, schedule.config, schedule.prediction)
        self._hash = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def data_hash(self) -> str:
        """Hash of names, labels, pixels, splits, repetitions and schedule: 16 hexadecimal digits."""
        return self._hash

    def walk(self, chunks: Sequence[Sequence[Row]], generator: torch.Generator | None) -> Iterator[DenoisingBatch]:
        """The batches of these rows.

        With a generator noise, timesteps, left out labels and mirrored images are drawn from it; without one noise and
        timesteps are those of the samples' names, always the same.
        """
        for rows in chunks:
            found = [(self._images[split], self._shown[i] if split == "inner" else i) for split, i in rows]
            images = torch.stack([part.denoised[i] for part, i in found])
            labels = torch.stack([self._labels[split][i] for split, i in rows])
            text = None
            if self._texts is not None:
                text = torch.stack([self._texts[-1 if part.text is None else int(part.text[i])] for part, i in found])
            weight = None
            if any(part.weight is not None for part, _ in found):
                weight = torch.stack([self._weight(part, i, images) for part, i in found])
            if generator is None:
                names = [part.names[i] for part, i in found]
                noise, steps = fixed_draws(names, tuple(images.shape[1:]), self.schedule.steps)
            else:
                noise = torch.randn(images.shape, generator=generator)
                steps = torch.randint(0, self.schedule.steps, (len(rows),), generator=generator)
                left_out = torch.rand(len(rows), generator=generator) < self.spec.label_dropout
                labels = torch.where(left_out, len(self._classes), labels)
                if text is not None and self._texts is not None:
                    text = torch.where(left_out[:, None, None], self._texts[-1], text)
                if self.spec.augment == "flip":
                    mirrored = (torch.rand(len(rows), generator=generator) < 0.5)[:, None, None, None]
                    images = torch.where(mirrored, images.flip(3), images)
                    weight = None if weight is None else torch.where(mirrored, weight.flip(3), weight)
            yield DenoisingBatch(images, labels, noise, steps, text, weight)

    def losses(self, model: nn.Module, batch: DenoisingBatch) -> Tensor:
        """The weighted squared error of every sample, (batch,), in float32 on the model's device.

        Where there are weights, the error of a sample is their weighted mean: `sum(w e) / sum(m)`, with `m` the
        mask's part of `w`.

        Raises:
            UsageError: when the model is no denoiser, or lacks a label.
        """
        device = device_of(model)
        errors = self._errors(model, batch, device)
        weights = self.schedule.weights(batch.timesteps.to(device), self.spec.snr_gamma)
        if batch.weight is not None:
            weight = batch.weight.to(device)
            # Masks average to 1 in each sample; what is left of the mean is the weight of prior images.
            return (errors * weight).flatten(1).mean(1) * weights
        return errors.flatten(1).mean(1) * weights

    def predict(self, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
        """Squared errors of shape (n, `spec.draws`) at the fixed draws, unweighted, and labels (n,), on the CPU.

        Modes of all modules and all random state are left as found.

        Raises:
            StoreError: for the test split before `unseal_test`.
        """
        if split == "test":
            self._seal.check()
        device = device_of(model)
        found: list[Tensor] = []
        labels: list[Tensor] = []
        with evaluating(model, device), torch.no_grad():
            for batch in self.batches(split):
                names = self._names(split, sum(len(errors) for errors in found), len(batch.labels))
                drawn = []
                for draw in range(self.spec.draws):
                    shape = tuple(batch.images.shape[1:])
                    noise, steps = fixed_draws(names, shape, self.schedule.steps, draw, self.spec.draws)
                    fixed = batch._replace(noise=noise, timesteps=steps)
                    drawn.append(self._errors(model, fixed, device).flatten(1).mean(1).cpu())
                found.append(torch.stack(drawn, 1))
                labels.append(batch.labels)
        return torch.cat(found), torch.cat(labels)

    def evaluate(self, model: nn.Module, split: Split) -> Mapping[str, float]:
        """`denoising_loss`: the mean squared error at fixed noise and timesteps, in evaluation mode.

        Raises:
            StoreError: for the test split before `unseal_test`.
            Diverged: when the model's outputs are not finite.
        """
        return self.judge(model, split)[0]

    def judge(self, model: nn.Module, split: Split) -> tuple[Mapping[str, float], Tensor]:
        """`evaluate`, and of every sample its error with the sign turned, float64 (n,): higher is better."""
        errors, _ = self.predict(model, split)
        if not bool(torch.isfinite(errors).all()):
            raise Diverged(f"the model's outputs on split {split!r} are not finite; lower the learning rate")
        per_sample = errors.double().mean(1)
        return {METRIC: float(per_sample.mean())}, -per_sample

    def images(self, split: Split) -> Tensor:
        """The images of a split, in file order and without repetitions, (n, C, H, W) in [-1, 1].

        Raises:
            StoreError: for the test split before `unseal_test`.
        """
        if split == "test":
            self._seal.check()
        return self._images[split].pixels.clone()

    def training_images(self) -> Tensor:
        """The images of inner, each once, (n, C, H, W) in [-1, 1]; `planted` names the rows that are repeated."""
        return self.images("inner")

    def training_labels(self) -> Tensor:
        """The classes of `training_images`, int64 (n,)."""
        return self._labels["inner"][: len(self._images["inner"].names)].clone()

    def conditions(self, rows: Sequence[int] | Tensor) -> Tensor:
        """What the model is told of these `training_images`, as `sample` takes it: int64 of shape (rows,)."""
        chosen, part = torch.as_tensor(rows, dtype=torch.int64), self._images["inner"]
        if self._texts is None:
            return self.training_labels()[chosen]
        return part.text[chosen] if part.text is not None else torch.full_like(chosen, len(self._texts) - 1)

    def sample(
        self,
        model: nn.Module,
        n: int,
        seed: int,
        labels: Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw images by DDIM (Song et al., arXiv 2010.02502, eta 0) with classifier-free guidance.

        The same model, seed and settings give the same images, whatever the batch size; modes and random state are
        left as found.

        Args:
            model: the denoiser.
            n: how many.
            seed: of the noise they start from.
            labels: (n,) classes, or rows of captions of inner for a model that takes texts; they take turns when None.
            steps: of the sampler; the task's when None.
            guidance: 1 samples the conditional model, more pushes away from the empty condition; the task's when None.
            progress: called with (steps done, steps in all).

        Returns:
            Float32 (n, C, H, W) in [-1, 1], on the CPU.

        Raises:
            UsageError: for labels of another number, or a guidance that the model has no empty label for.
            Diverged: when an image is not finite.
        """
        scale = self.spec.guidance if guidance is None else guidance
        device, scheduler = device_of(model), self.schedule.sampler(steps or self.spec.steps)
        conditions = self._turns(n) if labels is None else labels.to(torch.int64)
        if conditions.shape != (n,):
            raise UsageError(f"labels must have shape ({n},), got {tuple(conditions.shape)}")
        shape = self._images["inner"].denoised.shape[1:]
        start = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
        conditional = bool(label_rows(model)) or self._texts is not None
        found, done, total = [], 0, len(scheduler.timesteps) * -(-n // self._batch_size)
        with evaluating(model, device), torch.no_grad():
            for first in range(0, n, self._batch_size):
                x = start[first : first + self._batch_size].to(device)
                given = self._condition(conditions[first : first + self._batch_size], device)
                empty = self._condition(None, device, len(x))
                for t in scheduler.timesteps:
                    at = torch.full((len(x),), int(t), dtype=torch.int64, device=device)
                    output = denoise(model, x, at, *given)
                    if conditional and scale != 1:
                        without = denoise(model, x, at, *empty)
                        output = without + scale * (output - without)
                    x = scheduler.step(output, t, x, eta=0.0).prev_sample
                    done += 1
                    if progress is not None:
                        progress(done, total)
                found.append(x.cpu() if self._autoencoder is None else self._autoencoder.decode(x, device))
        images = torch.cat(found).clamp(-1, 1) if found else torch.empty(0, *shape)
        if not bool(torch.isfinite(images).all()):
            raise Diverged("a sampled image is not finite; the model has diverged")
        return images

    def noise_difference(
        self, model: nn.Module, rows: Sequence[int] | Tensor | None = None, draws: int = 4, seed: int = 0
    ) -> Tensor:
        """How much the condition moves the predicted noise of training images (after Wen et al., ICLR 2024).

        `|eps(x_t, c) - eps(x_t, empty)|_2` at noise and timesteps that depend on the image's name, the draw and the
        seed alone; large where a condition recalls one image.

        Args:
            model: the denoiser; modes and random state are left as found.
            rows: rows of `training_images`; all when None.
            draws: noise and timesteps per image, the timesteps stratified.
            seed: another one gives other draws.

        Returns:
            Norms (n, draws), float32 on the CPU.

        Raises:
            UsageError: for a model without a condition, or without an empty one.
        """
        self._check_condition(model)
        part, device = self._images["inner"], device_of(model)
        chosen = list(range(len(part.names))) if rows is None else [int(row) for row in rows]
        found = []
        with evaluating(model, device), torch.no_grad():
            for first in range(0, len(chosen), self._batch_size):
                now = chosen[first : first + self._batch_size]
                norms = []
                for draw in range(draws):
                    noise, at = drawn(part, now, self.schedule, draw, draws, seed)
                    x, at = self.schedule.noisy(part.denoised[now], noise, at).to(device), at.to(device)
                    condition = self._condition(self.conditions(now), device)
                    empty = self._condition(None, device, len(now))
                    norms.append(difference(model, self.schedule, x, at, condition, empty).flatten(1).norm(dim=1).cpu())
                found.append(torch.stack(norms, 1))
        return torch.cat(found)

    def recall_batches(self, batch_size: int) -> Iterator[DenoisingBatch]:
        """The planted images at the draws of `noise_difference`; all of inner, in a fixed random order, without plants.

        `labels` are rows of captions for a model that takes texts.
        """
        part = self._images["inner"]
        order = torch.randperm(len(part.names), generator=torch.Generator().manual_seed(0)).tolist()
        for rows, noise, steps in drawn_pairs(part, self.planted or order, self.schedule, _RECALL_DRAWS, batch_size):
            yield DenoisingBatch(part.denoised[rows], self.conditions(rows), noise, steps)

    def recall(self, model: nn.Module, batch: DenoisingBatch) -> Tensor:
        """`|eps(x_t, c) - eps(x_t, empty)|^2` per entry of an image, the mean of the batch.

        The square of what `noise_difference` takes the norm of: smooth where the two agree, too.

        Raises:
            UsageError: for a model without a condition, or without an empty one.
        """
        self._check_condition(model)
        device = device_of(model)
        x = self.schedule.noisy(batch.images, batch.noise, batch.timesteps).to(device)
        condition, empty = self._condition(batch.labels, device), self._condition(None, device, len(x))
        found = difference(model, self.schedule, x, batch.timesteps.to(device), condition, empty)
        return found.square().mean()

    def _check_condition(self, model: nn.Module) -> None:
        if not label_rows(model) and self._texts is None:
            raise UsageError("the model is told neither a class nor a text, so there is no condition to leave out")

    def _errors(self, model: nn.Module, batch: DenoisingBatch, device: torch.device) -> Tensor:
        images, noise = (t.to(device, non_blocking=True) for t in (batch.images, batch.noise))
        steps, labels = batch.timesteps.to(device), batch.labels.to(device)
        text = None if batch.text is None else batch.text.to(device)
        output = denoise(model, self.schedule.noisy(images, noise, steps), steps, labels, text)
        return (output - self.schedule.target(images, noise, steps)).square()

    def _condition(
        self, condition: Tensor | None, device: torch.device, n: int = 0
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels and texts of a condition; of the empty one for None."""
        if self._texts is not None:
            rows = torch.full((n,), len(self._texts) - 1) if condition is None else condition
            return torch.zeros(len(rows), dtype=torch.int64, device=device), self._texts[rows].to(device)
        labels = torch.full((n,), len(self._classes)) if condition is None else condition
        return labels.to(device), None

    def _turns(self, n: int) -> Tensor:
        part = self._images["inner"]
        if self._texts is not None:
            rows = torch.full((len(part.names),), len(self._texts) - 1) if part.text is None else part.text
            return rows[torch.arange(n) % len(rows)]
        return torch.arange(n) % len(self._classes)

    def _names(self, split: Split, start: int, n: int) -> list[str]:
        names = self._images[split].names
        return [names[self._shown[i]] if split == "inner" else names[i] for i in range(start, start + n)]

    @staticmethod
    def _weight(part: Images, row: int, images: Tensor) -> Tensor:
        return torch.ones_like(images[0, :1]) if part.weight is None else part.weight[row]
