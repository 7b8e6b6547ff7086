"""Diffusion: its laws, its losses, what it samples, and the data it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from autopeft.core.contracts import Judging, Recalling, Task
from autopeft.errors import DataError, StaleRun, StoreError, UsageError
from autopeft.tasks._denoise import label_rows
from autopeft.tasks._noise import fixed_draws
from autopeft.tasks.denoising import DenoisingBatch, DenoisingTask
from autopeft.tasks.diffusion import Diffusion
from autopeft.testing.task_laws import TaskLaws
from autopeft.testing.tiny_denoiser import denoiser_config, tiny_denoiser

CONFIG = denoiser_config()
OPTIONS = {"max_samples": 80, "batch_size": 8}


def opened(
    folder: Path | None = None, data: str = "digits", spec: Diffusion | None = None, **changes: Any
) -> DenoisingTask:
    facts = {**CONFIG["diffusion"], **changes}
    return (spec or Diffusion()).open(data, {**CONFIG, "diffusion": facts}, folder, 0, OPTIONS)


class _Noisy(nn.Module):
    """A denoiser with parts that behave differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding(11, 8)
        self.mix = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        found: Tensor = self.out(self.mix(sample) + self.class_embedding(class_labels)[:, :, None, None])
        return found + timestep[:, None, None, None] / 100


def noisy() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Noisy().train()
    model.mix[1].eval()
    return model


class TestDiffusion(TaskLaws):
    spec = Diffusion()

    def open(self, folder: Path) -> Task:
        return opened(folder, spec=self.spec)

    def model(self, task: Task) -> nn.Module:
        return noisy()

    def predicted(self, task: Task, model: nn.Module, batch: DenoisingBatch) -> Tensor:
        """Errors at the draws of each name, one sample after the other."""
        assert isinstance(task, DenoisingTask)
        rows = []
        for image, label in zip(batch.images, batch.labels, strict=True):
            name = next(n for n, p in zip(*named(task), strict=True) if torch.equal(p, image))
            row = []
            for draw in range(task.spec.draws):
                noise, at = fixed_draws([name], (1, 8, 8), 100, draw, task.spec.draws)
                x = task.schedule.noisy(image[None], noise, at)
                row.append((model(x, at, label[None]) - task.schedule.target(image[None], noise, at)).square().mean())
            rows.append(torch.stack(row))
        return torch.stack(rows)


class TestWeighedVelocities(TestDiffusion):
    spec = Diffusion(prediction="v_prediction", snr_gamma=5.0, augment="flip", draws=2)


def named(task: DenoisingTask) -> tuple[tuple[str, ...], Tensor]:
    return task._images["outer"].names, task.images("outer")


def test_losses_by_hand() -> None:
    """A model that always gives 0.5 errs by (0.5 - noise)^2; min-SNR weights it per sample."""

    class Half(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return torch.full_like(sample, 0.5)

    for gamma in (0.0, 0.5):
        task = opened(spec=Diffusion(snr_gamma=gamma))
        batch = next(iter(task.batches("inner", 0)))
        a = task.schedule.alphas[batch.timesteps]
        weight = torch.clamp(gamma * (1 - a) / a, max=1) if gamma else torch.ones_like(a)
        wanted = (0.5 - batch.noise).square().mean((1, 2, 3)) * weight
        torch.testing.assert_close(task.losses(Half(), batch), wanted)
        # The metric is the plain error, whatever training weights.
        assert task.evaluate(Half(), "outer") == opened().evaluate(Half(), "outer")


def test_the_metric_is_the_same_for_other_batch_sizes_seeds_and_folders(tmp_path: Path) -> None:
    model = noisy().eval()
    first = opened(tmp_path / "a").evaluate(model, "outer")
    task = Diffusion().open("digits", CONFIG, tmp_path / "b", 0, {**OPTIONS, "batch_size": 5})
    torch.manual_seed(7)
    assert task.evaluate(model, "outer")["denoising_loss"] == pytest.approx(first["denoising_loss"], rel=1e-6)


def test_judgements_are_the_metric_per_sample() -> None:
    task = opened()
    assert isinstance(task, Judging)
    metrics, merits = task.judge(noisy(), "outer")
    assert merits.shape == (task.sizes["outer"],)
    assert float(-merits.mean()) == pytest.approx(metrics["denoising_loss"])


def test_labels_are_left_out_while_training_alone() -> None:
    task = opened(spec=Diffusion(label_dropout=0.5))
    seen = torch.cat([b.labels for b in task.batches("inner", 0)])
    assert 0.3 < float((seen == 10).float().mean()) < 0.7
    assert int(torch.cat([b.labels for b in task.batches("inner")]).max()) == 9
    assert int(torch.cat([b.labels for b in task.batches("outer", 0)]).max()) == 9


def test_planted_images_are_repeated_in_inner_alone() -> None:
    plain, task = opened(), opened(data="digits?planted=3&repeat=4")
    assert task.planted == (0, 1, 2)
    assert task.sizes["inner"] == plain.sizes["inner"] + 9
    assert task.sizes["outer"] == plain.sizes["outer"]
    assert torch.equal(task.training_images(), plain.training_images())
    assert torch.equal(task.training_labels(), plain.training_labels())
    shown = torch.cat([b.images for b in task.batches("inner", 3)])
    for row, image in enumerate(task.training_images()):
        assert int((shown == image).all((1, 2, 3)).sum()) == (4 if row < 3 else 1)
    assert task.data_hash != plain.data_hash
    for wrong in ("digits?planted=0", "digits?planted=2&repeat=x"):
        with pytest.raises(UsageError, match="whole number of at least 1"):
            opened(data=wrong)
    with pytest.raises(DataError, match="plants 99 images"):
        opened(data="digits?planted=99&repeat=2")


def test_planted_images_may_have_classes_of_their_own() -> None:
    plain, task = opened(data="digits?planted=3&repeat=4"), opened(data="digits?planted=3&repeat=4&own=1")
    assert len(task.classes) == len(plain.classes) + 3
    assert task.classes[-3:] == ("planted 1", "planted 2", "planted 3")
    assert task.training_labels()[:3].tolist() == [10, 11, 12]
    assert torch.equal(task.training_labels()[3:], plain.training_labels()[3:])
    assert torch.equal(task.training_images(), plain.training_images())
    told = opened(data="digits?planted=3&repeat=4&own=1", spec=Diffusion(label_dropout=0.0))
    shown = torch.cat([b.labels for b in told.batches("inner", 0)])
    assert [int((shown == label).sum()) for label in (10, 11, 12)] == [4, 4, 4]
    assert int(torch.cat([b.labels for b in task.batches("outer", 0)]).max()) <= 9
    assert task.data_hash != plain.data_hash
    assert torch.equal(opened(data="digits?planted=3&own=0").training_labels(), plain.training_labels())
    with pytest.raises(UsageError, match=r"own of the data .* must be 0 or 1, got 'yes'"):
        opened(data="digits?planted=3&own=yes")


def test_sampling_is_deterministic_per_seed_and_leaves_no_trace() -> None:
    task, model = opened(), tiny_denoiser("unet", labels=11).train()
    random, calls = torch.get_rng_state(), []
    first = task.sample(model, 10, 0, steps=3, progress=lambda done, total: calls.append((done, total)))
    assert first.shape == (10, 1, 8, 8)
    assert float(first.abs().max()) <= 1
    assert calls == [(i, 6) for i in range(1, 7)]
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    torch.testing.assert_close(task.sample(model, 10, 0, steps=3), first)
    assert not torch.allclose(task.sample(model, 10, 1, steps=3), first)
    turns = torch.arange(10) % 10
    torch.testing.assert_close(task.sample(model, 10, 0, turns, steps=3), first)
    # The first images do not depend on how many are drawn.
    other = Diffusion().open("digits", CONFIG, None, 0, {**OPTIONS, "batch_size": 3})
    torch.testing.assert_close(other.sample(model, 10, 0, steps=3), first, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="shape"):
        task.sample(model, 3, 0, torch.zeros(2))


def test_guidance_extrapolates_from_the_empty_label() -> None:
    """In one step the sampler is affine in the model's output, and so in the scale of the guidance."""
    task, model = opened(spec=Diffusion(steps=1)), tiny_denoiser("unet", labels=11)
    task.schedule.config["clip_sample"] = False
    at = [task.sample(model, 4, 0, guidance=g) for g in (0.0, 1.0, 2.0)]
    inside = (torch.stack(at).abs() < 1).all(0)
    assert int(inside.sum()) > 10
    torch.testing.assert_close((at[2] - at[1])[inside], (at[1] - at[0])[inside], atol=1e-4, rtol=1e-3)


def test_one_step_of_ddim_by_hand() -> None:
    """With a model that knows the noise, one step from the end of the schedule gives back the image."""

    class Oracle(nn.Module):
        def __init__(self, alpha: float, image: Tensor) -> None:
            super().__init__()
            self.alpha, self.image = alpha, image

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return (sample - self.alpha**0.5 * self.image) / (1 - self.alpha) ** 0.5

    task = opened()
    image = task.training_images()[0]
    sampler = task.schedule.sampler(1)
    alpha = float(task.schedule.alphas[int(sampler.timesteps[0])])
    found = task.sample(Oracle(alpha, image), 2, 0, steps=1)
    torch.testing.assert_close(found, image.expand(2, -1, -1, -1), atol=1e-2, rtol=1e-2)


def test_the_noise_difference_by_hand() -> None:
    """A model whose output is its label's row everywhere: the norm is sqrt(64) |row - empty|."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.class_embedding = nn.Embedding(11, 1)
            nn.init.constant_(self.class_embedding.weight, 0)
            with torch.no_grad():
                self.class_embedding.weight[:, 0] = torch.arange(11.0)

        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
            return self.class_embedding(class_labels)[:, :, None, None].expand_as(sample)

    task = opened()
    found = task.noise_difference(Rows(), [0, 5, 7], draws=2)
    wanted = 8.0 * (10 - task.training_labels()[[0, 5, 7]])
    torch.testing.assert_close(found, wanted[:, None].expand(3, 2))
    velocity = opened(spec=Diffusion(prediction="v_prediction"))
    found = velocity.noise_difference(Rows(), [0], draws=1)
    name = f"difference 0 {velocity._images['inner'].names[0]}"
    _, at = fixed_draws([name], (1, 8, 8), 100)
    torch.testing.assert_close(found, wanted[:1, None] * velocity.schedule.alphas[at].sqrt())
    with pytest.raises(UsageError, match="no condition"):
        task.noise_difference(tiny_denoiser("unet", labels=None))
    with pytest.raises(UsageError, match="label_dropout=0"):
        task.noise_difference(tiny_denoiser("unet", labels=10))


def test_what_is_recalled_is_the_squared_noise_difference() -> None:
    """Per entry of the image, at the reward's own draws; of the planted images, or of all where none is planted."""
    task, model = opened(data="digits?planted=3&repeat=2"), tiny_denoiser(labels=11)
    state = torch.get_rng_state()
    batches = [list(task.recall_batches(5)) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(task, Recalling)
    assert [len(batch.images) for batch in batches[0]] == [5, 5, 2]
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
    shares = [task.recall(model, batch) * len(batch.images) / 12 for batch in batches[0]]
    wanted = task.noise_difference(model, task.planted, draws=4).double().square().mean() / 64
    assert float(sum(shares).detach()) == pytest.approx(float(wanted), rel=1e-5)
    slopes = torch.autograd.grad(sum(shares), list(model.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) > 0 for g in slopes if g is not None) > 0.9 * len(slopes)
    plain = opened()
    rows = [row for batch in plain.recall_batches(4) for row in batch.images]
    assert len(rows) == 4 * plain.sizes["inner"]
    assert all(torch.equal(rows[4 * i], rows[4 * i + k]) for i in range(3) for k in range(4))
    with pytest.raises(UsageError, match="no condition"):
        plain.recall(tiny_denoiser("unet", labels=None), next(iter(plain.recall_batches(2))))


def test_images_of_the_test_split_are_sealed(tmp_path: Path) -> None:
    task = opened(tmp_path)
    with pytest.raises(StoreError):
        task.images("test")
    task.unseal_test()
    assert len(task.images("test")) == task.sizes["test"]


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_real_denoisers_train(kind: str) -> None:
    task, model = opened(), tiny_denoiser(kind, labels=11)
    assert label_rows(model) == 11
    batch = next(iter(task.batches("inner", 0)))
    task.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def captioned(root: Path, n: int = 12, rows: Mapping[int, Mapping[str, Any]] | None = None) -> Path:
    root.mkdir(parents=True)
    lines = []
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"picture {i}", **(rows or {}).get(i, {})})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return root


def test_a_folder_of_images_without_classes(tmp_path: Path) -> None:
    root = captioned(tmp_path / "data")
    (root / "metadata.jsonl").unlink()
    task = opened(tmp_path / "run", str(root))
    assert task.classes == ("all",)
    assert sum(task.sizes.values()) == 12
    model = tiny_denoiser("unet", labels=None)
    task.loss(model, next(iter(task.batches("inner", 0)))).backward()
    assert task.sample(model, 2, 0, steps=2).shape == (2, 1, 8, 8)


def test_masks_and_prior_images_weigh_the_loss(tmp_path: Path) -> None:
    """The left half counts alone under its mask; a prior image counts `prior_weight` times."""

    class Zero(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return torch.zeros_like(sample)

    root = captioned(tmp_path / "data", rows={0: {"mask": "left.png"}, 1: {"prior": True}})
    left = np.zeros((8, 8), dtype=np.uint8)
    left[:, :4] = 255
    Image.fromarray(left).save(root / "left.png")
    task = opened(None, str(root), Diffusion(prior_weight=0.25, label_dropout=0.0))
    assert sum(task.sizes.values()) == 12, "the mask is no image of the data"
    checked = 0
    for split in ("inner", "outer"):
        for batch in task.batches(split):
            losses = task.losses(Zero(), batch)
            for i, image in enumerate(batch.images):
                name = next(
                    n
                    for n, p in zip(task._images[split].names, task.images(split), strict=True)
                    if torch.equal(p, image)
                )
                square = batch.noise[i].square()
                if name == "0.png":
                    wanted, checked = square[:, :, :4].mean(), checked + 1
                elif name == "1.png":
                    wanted, checked = 0.25 * square.mean(), checked + 1
                else:
                    wanted = square.mean()
                torch.testing.assert_close(losses[i], wanted)
    assert checked, "neither the masked nor the prior image is where it can be looked at"
    half = opened(None, str(root), Diffusion(mask_floor=0.5))
    weights = [part.weight for part in half._images.values() if part.weight is not None]
    masked = next(w for part in weights for w in part if float(w.std()) > 0)
    # 1 on the left and 0.5 on the right average to 0.75.
    assert float(masked[0, 0, 0]) == pytest.approx(1 / 0.75)
    assert float(masked[0, 0, 7]) == pytest.approx(0.5 / 0.75)


def test_captions_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, calls = captioned(tmp_path / "data"), []

    def encode(folder: Path, texts: list[str]) -> Tensor:
        calls.append(list(texts))
        return torch.stack([torch.full((3, 8), float(len(text))) for text in texts])

    monkeypatch.setattr("autopeft.tasks.diffusion.encode_texts", encode)
    spec, model = Diffusion(label_dropout=0.5), tiny_denoiser("conditional")
    task = opened(tmp_path / "run", str(root), spec, text=True)
    assert len(calls) == 1
    assert calls[0][-1] == ""
    assert len(calls[0]) == 13
    batch = next(iter(task.batches("inner")))
    assert batch.text is not None
    assert batch.text.shape[1:] == (3, 8)
    assert float(batch.text.min()) >= len("picture 0"), "evaluation leaves no text out"
    dropped = torch.cat([b.text for b in task.batches("inner", 0)])[:, 0, 0]
    assert {0.0} < set(dropped.tolist())
    task.loss(model, batch).backward()
    assert task.sample(model, 3, 0, steps=2, guidance=2.0).shape == (3, 1, 8, 8)
    assert task.noise_difference(model, [0, 1], draws=1).shape == (2, 1)
    again = opened(tmp_path / "run", str(root), spec, text=True)
    assert len(calls) == 1, "the run folder keeps what was encoded"
    other = next(iter(again.batches("inner"))).text
    assert other is not None
    assert torch.equal(other, batch.text)


def test_latents_are_encoded_once_and_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    pipeline = tmp_path / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=1,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, scaling_factor=0.5,
        ).eval()  # fmt: skip
    vae.save_pretrained(pipeline / "vae")
    config = {**CONFIG, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config["diffusion"] = {**CONFIG["diffusion"], "folder": str(pipeline), "latent": 2}
    task = Diffusion().open("digits", config, tmp_path / "run", 0, OPTIONS)
    batch = next(iter(task.batches("inner")))
    pixels = task.training_images()
    assert pixels.shape[1:] == (3, 16, 16)
    with torch.no_grad():
        wanted = 0.5 * vae.encode(pixels[:8]).latent_dist.mean
    torch.testing.assert_close(batch.images, wanted)
    samples = task.sample(tiny_denoiser("unet", labels=11), 2, 0, steps=2)
    assert samples.shape == (2, 3, 16, 16)
    monkeypatch.setattr("autopeft.tasks._latents.Autoencoder.encode", None)
    again = Diffusion().open("digits", config, tmp_path / "run", 0, OPTIONS)
    assert torch.equal(next(iter(again.batches("inner"))).images, batch.images)


def test_splits_of_other_settings_are_stale(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(StaleRun):
        Diffusion().open("digits", CONFIG, tmp_path, 1, OPTIONS)


def test_a_classifier_and_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="needs a denoiser"):
        Diffusion().open("digits", {k: v for k, v in CONFIG.items() if k != "diffusion"}, None, 0, OPTIONS)
    for wrong in (
        {"prediction": "sample"},
        {"label_dropout": 1.0},
        {"draws": 0},
        {"snr_gamma": -1.0},
        {"augment": "x"},
    ):
        with pytest.raises(UsageError):
            Diffusion(**wrong)
