"""How a model is called on images alone, whatever else it takes."""

from __future__ import annotations

from torch import Tensor, nn

from autopeft.models._denoiser import example_call

__all__ = ["output_on"]


def output_on(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output for images: logits of a classifier, (n, classes); what a denoiser predicts at timestep 0.

    Args:
        model: the model; called in the mode it is in.
        images: (n, C, H, W), on the model's device. Labels and texts of a denoiser are zeros.
    """
    args, kwargs = example_call(model, images)
    output = model(*args, **kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return found
