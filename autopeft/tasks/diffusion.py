"""Fine-tuning a diffusion model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from autopeft.core.outcome import Split
from autopeft.errors import DataError, UsageError
from autopeft.store.paths import RunFolder
from autopeft.tasks._found import found_again
from autopeft.tasks._latents import Autoencoder, encode_texts, kept
from autopeft.tasks._noise import Prediction, Schedule
from autopeft.tasks._options import DataOptions
from autopeft.tasks._pixels import PixelStore, Preprocessing
from autopeft.tasks.cut import CutRule, cut
from autopeft.tasks.denoising import METRIC, DenoisingTask, Images
from autopeft.tasks.sources._query import split_query
from autopeft.tasks.sources.captions import METADATA, Captioned, open_captions, open_unlabelled
from autopeft.tasks.sources.folder import has_images
from autopeft.tasks.sources.open import open_source
from autopeft.tasks.sources.source import Sample
from autopeft.tasks.splits import Splits

__all__ = ["Diffusion"]

_SPLITS: tuple[Split, ...] = get_args(Split)
_PLANTS: Mapping[str, int] = MappingProxyType({"planted": 0, "repeat": 1, "own": 0})
"""What may be asked behind a specification of data, and what holds where it is not."""

_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Diffusion:
    """Denoising: unconditional, told a class, or told a text, as the model is.

    Attributes:
        prediction: what the model's output is, `epsilon` (the noise) or `v_prediction`; as its scheduler says if None.
        snr_gamma: gamma of min-SNR weighting (Hang et al., arXiv 2303.09556; 5 there); 0 weights all timesteps alike.
        label_dropout: share of training samples that are shown without their label or text.
        augment: `flip` mirrors half of the training images.
        draws: fixed noises and timesteps per sample of an evaluation.
        steps: steps of the DDIM sampler.
        guidance: scale of classifier-free guidance when sampling; 1 samples the conditional model.
        mask_floor: weight in the loss of what a mask shows black, relative to white (mask guidance): 1 ignores masks.
        prior_weight: weight in the loss of prior images, relative to the others (DreamBooth's prior preservation).

    Raises:
        UsageError: for values out of range.
    """

    prediction: Prediction | None = None
    snr_gamma: float = 0.0
    label_dropout: float = 0.1
    augment: Literal["none", "flip"] = "none"
    draws: int = 4
    steps: int = 25
    guidance: float = 1.0
    mask_floor: float = 0.0
    prior_weight: float = 1.0

    DEFAULTS: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "model": {"spec": "bundled:unet_tiny_fashion"},
            "data": {"spec": "digits?planted=16&repeat=16"},
            "reward": {"type": "metric", "name": METRIC, "direction": "minimize"},
            "head_warmup": False,
            "search": {"trials": 6, "seeds": 2},
        }
    )
    """What a study of this task is unless it says otherwise: a denoiser costs a multiple of a classifier per image."""

    def __post_init__(self) -> None:
        if self.prediction is not None and self.prediction not in get_args(Prediction):
            raise UsageError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {self.prediction!r}")
        if self.augment not in ("none", "flip"):
            raise UsageError(f"augment must be none or flip, got {self.augment!r}")
        for name in ("label_dropout", "mask_floor"):
            value, top = getattr(self, name), name == "mask_floor"
            if not (0 <= value < 1 or (top and value == 1)):
                raise UsageError(f"{name} must lie between 0 and 1, got {value}")
        for name in ("snr_gamma", "prior_weight", "guidance"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("draws", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")

    def open(
        self, data: str, data_config: Mapping[str, Any], folder: Path | None, seed: int, options: Mapping[str, Any]
    ) -> DenoisingTask:
        """Open a data specification as a task; satisfies `autopeft.core.contracts.TaskSpec`.

        Splits are cut, written and read back as for classification; images without classes are cut as one class.
        Latents of the autoencoder and encoded captions are computed once and kept in the run folder.

        Args:
            data: what classification takes (a folder per class, `digits`, `torch/...`, `hfds/...`, `csv:...`), a
                folder of images without classes, or one with captions in `metadata.jsonl`; see
                `autopeft.tasks.sources.captions`. `?planted=N&repeat=R` behind it shows the first N images of
                inner R times as often as the others, so that memorising them can be measured; `&own=1` gives each of
                them a class of its own, as a caption that no other image has.
            data_config: the model's preprocessing, with `diffusion` as `autopeft.models.diffusers` gives it.
            folder: the run folder; None writes nothing.
            seed: seed of the cut.
            options: as for classification.

        Raises:
            DataError: for data that is absent, corrupt or empty.
            UsageError: for a specification or option that nobody knows, or a model that is no denoiser.
            StaleRun: when the folder's splits were made with other options, or of other data.
            MissingDependency: without diffusers, or where captions are encoded without transformers.
        """
        facts = data_config.get("diffusion")
        if not isinstance(facts, Mapping):
            raise UsageError(
                "task diffusion needs a denoiser; give --model diffusers:OWNER/NAME#unet or diffusers:FOLDER"
            )
        checked = DataOptions.of(options)
        rule = CutRule(seed, checked.val_frac, checked.test_frac, checked.max_samples, checked.max_inner)
        schedule = Schedule(facts.get("scheduler") or {}, self.prediction)
        place, plants = _planted(data)
        found = _open(place, checked.download)
        latent = int(facts.get("latent", 1))
        store = PixelStore(Preprocessing(_pixel_config(data_config, latent)), 0, checked.threads)
        splits, samples = _split(found, rule, store, folder)
        model_folder = Path(facts["folder"])
        vae = Autoencoder(model_folder) if latent > 1 else None
        images = {split: self._images(found, samples[split], store, vae, folder, split) for split in _SPLITS}
        texts = _texts(found, splits, images, model_folder, folder) if facts.get("text") else None
        if plants["planted"] > len(splits.inner):
            raise DataError(f"{data} plants {plants['planted']} images, and inner has {len(splits.inner)}")
        classes, labels = splits.classes, {split: list(splits[split].labels) for split in _SPLITS}
        if plants["own"]:
            labels["inner"][: plants["planted"]] = range(len(classes), len(classes) + plants["planted"])
            classes = (*classes, *(f"planted {i + 1}" for i in range(plants["planted"])))
        return DenoisingTask(
            self,
            schedule,
            classes,
            labels,
            images,
            planted=tuple(range(plants["planted"])),
            repeat=plants["repeat"],
            texts=texts,
            autoencoder=vae,
            digest=_digest(splits, found) + ("own" if plants["own"] else ""),
            data_config=data_config,
            batch_size=checked.batch_size,
            folder=folder,
            token=checked.unseal_token,
        )

    def _images(
        self,
        found: Captioned,
        samples: tuple[Sample, ...],
        store: PixelStore,
        vae: Autoencoder | None,
        folder: Path | None,
        split: Split,
    ) -> Images:
        """The samples of a split as tensors."""
        names = tuple(s.name for s in samples)
        chunks = [samples[i : i + _CHUNK] for i in range(0, len(samples), _CHUNK)]
        pixels = torch.cat([store.preprocessing.to_input(part) for part in store.batches(chunks)])
        images = Images(names, pixels)
        if vae is not None:
            path = None if folder is None else folder / "latents" / f"{split}-{vae.identity}.safetensors"
            images.latents = kept(path, names, _encoded(vae, pixels))
        if found.masks or found.priors:
            size = images.denoised.shape[2:]
            weights = [self._weight(found, name, store, size) for name in names]
            images.weight = torch.stack(weights)
        return images

    def _weight(self, found: Captioned, name: str, store: PixelStore, size: torch.Size) -> Tensor:
        """Weights of one sample's pixels, (1, H, W): they average to 1, times the weight of prior images."""
        mask = found.mask(name)
        weight = torch.ones(1, *size)
        if mask is not None:
            grey = store.preprocessing.to_bytes(mask).float().mean(0, keepdim=True) / 255
            grey = F.adaptive_avg_pool2d(grey[None], (int(size[0]), int(size[1])))[0]
            weight = self.mask_floor + (1 - self.mask_floor) * grey
            if not float(weight.sum()):
                raise DataError(f"the mask of {name} is black everywhere, so nothing of it would count; remove it")
            weight = weight / weight.mean()
        return weight * (self.prior_weight if name in found.priors else 1.0)


def _planted(data: str) -> tuple[str, dict[str, int]]:
    """The specification without its plants, and the plants."""
    place, _, query = data.rpartition("?")
    if not place or not any(query.startswith(f"{key}=") or f"&{key}=" in query for key in _PLANTS):
        return data, dict(_PLANTS)
    _, settings = split_query(f"data?{query}", tuple(_PLANTS))
    found = dict(_PLANTS)
    for key, text in settings.items():
        if key == "own" and text not in ("0", "1"):
            raise UsageError(f"own of the data {data!r} must be 0 or 1, got {text!r}")
        if key != "own" and (not text.isdigit() or int(text) < 1):
            raise UsageError(f"{key} of the data {data!r} must be a whole number of at least 1, got {text!r}")
        found[key] = int(text)
    return place, found


def _open(spec: str, download: bool) -> Captioned:
    path = Path(spec.removeprefix("imagefolder+captions:")).expanduser()
    if (path / METADATA).is_file() or (path / "train" / METADATA).is_file() or spec.startswith("imagefolder+"):
        return open_captions(path)
    if path.is_dir() and has_images(path):
        return Captioned(open_unlabelled(path), {}, {})
    return Captioned(open_source(spec, download), {}, {})


def _pixel_config(data_config: Mapping[str, Any], latent: int) -> dict[str, Any]:
    """The preprocessing of the images themselves, in front of an autoencoder where there is one."""
    channels, height, width = data_config["input_size"]
    size = (channels, height, width) if latent == 1 else (3, height * latent, width * latent)
    return {**data_config, "input_size": size}


def _split(
    found: Captioned, rule: CutRule, store: PixelStore, folder: Path | None
) -> tuple[Splits, dict[Split, tuple[Sample, ...]]]:
    """The splits, as the run folder has them or cut now."""
    path = None if folder is None else RunFolder(folder).splits
    if path is not None and path.exists():
        splits = Splits.read(path)
        samples = found_again(splits, rule, found.source, path)
        for split in _SPLITS:
            store.expect(dict(zip(splits[split].names, splits[split].pixels, strict=True)))
        return splits, samples
    planned = cut(found.source, rule)
    pixels = store.hashes([s for split in _SPLITS for s in planned[split]])
    splits = Splits.without_leaks(found.source.classes, rule, planned, pixels)
    if path is not None:
        splits.write(path)
    return splits, {s: tuple(x for x in planned[s] if x.name in set(splits[s].names)) for s in _SPLITS}


def _texts(
    found: Captioned, splits: Splits, images: Mapping[Split, Images], model: Path, folder: Path | None
) -> Tensor:
    """Encoded captions, each text once and the empty one last; a class's name stands in for a caption."""
    named = splits.classes if len(splits.classes) > 1 else ("",)
    captions = {
        split: [found.texts.get(n, named[y]) for n, y in zip(images[split].names, splits[split].labels, strict=True)]
        for split in _SPLITS
    }
    distinct = [*dict.fromkeys(text for split in _SPLITS for text in captions[split] if text), ""]
    index = {text: i for i, text in enumerate(distinct)}
    for split in _SPLITS:
        images[split].text = torch.tensor([index[text] for text in captions[split]])
    path = None if folder is None else folder / "latents" / "texts.safetensors"
    return kept(path, [str(model), *distinct], _once(model, distinct))


def _once(model: Path, texts: list[str]) -> Iterator[Tensor]:
    yield encode_texts(model, texts)


def _encoded(vae: Autoencoder, pixels: Tensor) -> Iterator[Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for start in range(0, len(pixels), _CHUNK):
        yield vae.encode(pixels[start : start + _CHUNK], device)


def _digest(splits: Splits, found: Captioned) -> str:
    """Hash of the splits and of captions, masks and prior images."""
    digest = hashlib.sha256(splits.digest.encode())
    digest.update(repr((sorted(found.texts.items()), sorted(found.priors))).encode())
    for name, path in sorted(found.masks.items()):
        try:
            digest.update(name.encode() + path.read_bytes())
        except OSError as error:
            raise DataError(f"the mask {path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()[:16]
