"""Two models small enough for every test: a vision transformer and a convolutional network."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["tiny_convnet", "tiny_vit"]

_SPREAD = 0.02
"""Standard deviation of the noise put on constants, so that no test passes because a scale is one or a bias zero."""


def tiny_vit(num_classes: int = 4, seed: int = 0) -> nn.Module:
    """A timm vision transformer for images (3, 8, 8): 2 blocks of width 16, 2 heads, 4 patches and a class token.

    Args:
        num_classes: outputs of the classifier `head`.
        seed: seed of the weights; the caller's random state is left alone.

    Returns:
        The model in evaluation mode, on the CPU, in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = VisionTransformer(
            img_size=8, patch_size=4, in_chans=3, num_classes=num_classes, embed_dim=16, depth=2, num_heads=2
        )
        _roughen(model)
    return model.eval()


def tiny_convnet(num_classes: int = 4, seed: int = 0, width: int = 16, groups: int = 4) -> nn.Module:
    """A residual network for images (3, H, W): stem, 2 blocks (grouped 3x3, then 1x1), mean pooling, classifier `fc`.

    Args:
        num_classes: outputs of the classifier.
        seed: seed of the weights; the caller's random state is left alone.
        width: channels; a multiple of `groups`.
        groups: groups of the 3x3 convolutions; `width` makes them depthwise.

    Returns:
        The model in evaluation mode, on the CPU, in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _ConvNet(num_classes, width, groups)
        _roughen(model)
    return model.eval()


class _ConvBlock(nn.Module):
    """Residual block: grouped 3x3 convolution, norm, activation, 1x1 convolution with bias."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in and out."""
        branch: Tensor = self.conv2(self.act(self.bn1(self.conv1(x))))
        return x + branch


class _ConvNet(nn.Module):
    """Stem, two residual blocks, global mean, Linear."""

    def __init__(self, num_classes: int, width: int, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.GELU()
        self.blocks = nn.Sequential(_ConvBlock(width, groups), _ConvBlock(width, groups))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        x = self.blocks(self.act(self.norm(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _roughen(model: nn.Module) -> None:
    """Put noise on weights of norms, biases and running statistics, which start as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(_SPREAD * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(_SPREAD * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(1 + _SPREAD * torch.rand_like(buffer))
