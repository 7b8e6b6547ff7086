"""Which model to borrow, as a user writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopeft.errors import UsageError

__all__ = ["ModelSpec"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model specification.

    Attributes:
        spec: a timm name (`vit_base_patch16_224.augreg_in21k`), `bundled:NAME`, `local-dir:FOLDER`,
            `hf-hub:OWNER/NAME`, `diffusers:OWNER/NAME#unet`, `diffusers:FOLDER#unet` or `py:package.module:function`.
        pretrained: whether to load weights; False gives seeded random ones.
        pretrained_path: a file of weights (`.safetensors`, or `.pth` of tensors) to load instead of published ones.
        img_size: height and width of the input in pixels, another one than the model's own.
        kwargs: further arguments of the model's constructor.

    Raises:
        UsageError: for an empty specification or an image size below 1.
    """

    spec: str = "bundled:vit_tiny_fashion"
    pretrained: bool = True
    pretrained_path: str | None = None
    img_size: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.spec.strip():
            raise UsageError("the model specification is empty; give a timm name such as 'vit_base_patch16_224'")
        if self.img_size is not None and self.img_size < 1:
            raise UsageError(f"the image size must be at least 1 pixel, got {self.img_size}")
        for reserved in ("pretrained", "pretrained_cfg", "checkpoint_path"):
            if reserved in self.kwargs:
                raise UsageError(
                    f"the model argument {reserved!r} cannot be given by hand; use the model's `pretrained` or "
                    "`pretrained_path` instead"
                )
        if self.img_size is not None and self.kwargs.get("img_size", self.img_size) != self.img_size:
            raise UsageError(
                f"the image size is given twice and differs: {self.img_size} and model argument "
                f"img_size={self.kwargs['img_size']}"
            )
