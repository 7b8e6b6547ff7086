"""When two trials are the same training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from autopeft.core.allocation import Allocation
from autopeft.core.codec import encode

__all__ = ["equality_key"]


def equality_key(
    allocation: Allocation, methods: Mapping[str, Any], train: Any, data_hash: str, seed: int, fidelity: int
) -> str:
    """64 hexadecimal digits; equal for trials that train the same adapters in the same way on the same data.

    Args:
        allocation: the plan; predicted gains do not matter, chosen entries do.
        methods: method key to method; only those that the plan uses matter.
        train: the training settings, a frozen dataclass.
        data_hash: hash of samples and splits.
        seed: seed of initialisation and order.
        fidelity: epochs, or any other whole number that says how long.
    """
    used = sorted({option.method for option in allocation})
    facts = [
        allocation.digest,
        {key: [type(methods[key]).__qualname__, encode(methods[key])] for key in used},
        encode(train),
        data_hash,
        seed,
        fidelity,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
