"""The frozen halves beside a denoiser: an autoencoder's latents and encoded captions, each computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autopeft.errors import CorruptFile, MissingDependency, UsageError

__all__ = ["Autoencoder", "encode_texts", "kept"]


class Autoencoder:
    """The VAE of a pipeline of diffusers, frozen, on the CPU until it is called.

    Args:
        folder: the pipeline's folder; its `vae` is read when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "vae"
        self._model: Any = None

    @property
    def identity(self) -> str:
        """16 hexadecimal digits of its settings and the size of its files."""
        files = sorted((p.name, p.stat().st_size) for p in self._folder.iterdir() if p.is_file())
        config = (self._folder / "config.json").read_bytes()
        return hashlib.sha256(repr(files).encode() + config).hexdigest()[:16]

    def encode(self, images: Tensor, device: torch.device) -> Tensor:
        """Latents of images in [-1, 1] (b, 3, H, W): the means, shifted and scaled as the denoiser takes them."""
        model = self._loaded(device)
        with torch.no_grad():
            means: Tensor = model.encode(images.to(device)).latent_dist.mean
        shift, scale = self._constants()
        return ((means - shift) * scale).cpu()

    def decode(self, latents: Tensor, device: torch.device) -> Tensor:
        """Images in [-1, 1] (b, 3, H, W) of latents."""
        model = self._loaded(device)
        shift, scale = self._constants()
        with torch.no_grad():
            images: Tensor = model.decode(latents.to(device) / scale + shift).sample
        return images.clamp(-1, 1).cpu()

    def _loaded(self, device: torch.device) -> Any:
        if self._model is None:
            import diffusers

            kind = getattr(diffusers, json.loads((self._folder / "config.json").read_text())["_class_name"])
            model = kind.from_pretrained(self._folder, torch_dtype=torch.float32, local_files_only=True)
            self._model = model.eval().requires_grad_(False)
        return self._model.to(device)

    def _constants(self) -> tuple[float, float]:
        config = self._model.config
        return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)


def encode_texts(folder: Path, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Hidden states of texts by the frozen text encoder of a pipeline, (n, length, width), float32 on the CPU.

    Raises:
        UsageError: when the pipeline has no `text_encoder` and `tokenizer`.
        MissingDependency: without transformers.
    """
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise UsageError(
                f"the model looks at texts, and {folder} holds no {part}; give the folder of a whole pipeline"
            )
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingDependency("transformers", "diffusion", "encode captions") from error
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder / "text_encoder", local_files_only=True).float().eval()
    model = getattr(model, "text_model", model)
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            length = min(int(tokenizer.model_max_length), 512)
            tokens = tokenizer(
                list(texts[start : start + batch_size]), padding="max_length", max_length=length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            found.append(model(tokens["input_ids"]).last_hidden_state.float())
    return torch.cat(found)


def kept(path: Path | None, names: Sequence[str], make: Iterable[Tensor]) -> Tensor:
    """Tensors made once: read from a file when it holds these names in this order, else made and written there.

    Args:
        path: the file; None keeps nothing.
        names: what the rows are called.
        make: the rows in portions, walked only when they are not there.

    Raises:
        CorruptFile: when the file cannot be read.
    """
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()
    if path is not None and path.is_file():
        try:
            found: Mapping[str, Tensor] = load_file(path)
        except Exception as error:
            raise CorruptFile(f"{path} cannot be read ({error}); remove it, it is made again") from error
        if digest in found:
            return found[digest]
    rows = torch.cat(list(make))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        save_file({digest: rows.contiguous()}, draft)
        draft.replace(path)
    return rows
