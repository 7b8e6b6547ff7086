"""What a training is: two of one identity give the same weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from autopeft.core.codec import encode
from autopeft.core.contracts import Inserted, Method, Task
from autopeft.training.settings import TrainSettings

__all__ = ["training_identity"]


def training_identity(
    inserted: Inserted, task: Task, settings: TrainSettings, methods: Mapping[str, Method], facts: Mapping[str, Any]
) -> str:
    """16 hexadecimal digits of everything that decides a training's result on one device.

    The plan, the settings (but the threads), the data, and the tensors that adapters and head start from.

    Args:
        inserted: the model with adapters, before the first step.
        task: the data.
        settings: the settings.
        methods: method key to method.
        facts: what else decides, as plain data: the seed, the splits.
    """
    start = hashlib.sha256()
    for name, tensor in sorted(inserted.state().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start.update(name.encode() + raw.numpy().tobytes())
    plain = {key: value for key, value in encode(settings).items() if key != "threads"}
    used = {option.method for option in inserted.allocation}
    rows = [
        inserted.allocation.digest,
        {key: repr(methods[key]) for key in sorted(used)},
        plain,
        task.data_hash,
        dict(facts),
        start.hexdigest(),
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
