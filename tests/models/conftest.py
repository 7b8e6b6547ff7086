"""Random-weight models of the five families, built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from torch import nn

from autopeft.core.site import Catalog
from autopeft.models.scan import scan

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 48}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 2, 1), "embed_dim": 24}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
    "resnet": ("resnet18", {}),
    "efficientnet": ("tf_efficientnet_lite0", {}),
}


@cache
def _build(family: str) -> tuple[nn.Module, Catalog]:
    name, args = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=5, **args).eval()
    size = 56 if family == "swin" else 32
    return model, scan(model, torch.zeros(1, 3, size, size))


@pytest.fixture(scope="session")
def family() -> Callable[[str], tuple[nn.Module, Catalog]]:
    """`family("vit")` gives a model and its catalogue; leave both as they are."""
    return _build
