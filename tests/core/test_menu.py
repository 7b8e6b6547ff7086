from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

import numpy as np
import pytest

from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Menu, Option
from autopeft.core.site import Place

W = Place("fc", "weight")
GOOD: dict[str, Any] = {
    "site": "fc",
    "method": "lora",
    "size": 2,
    "cost": Cost.plain(24, 32),
    "gain": 0.5,
    "places": (W,),
}


def test_indices_are_hashed_as_little_endian_int64() -> None:
    indices = Indices(np.array([1, 5, 9]))
    assert len(indices) == 3
    assert indices.sha256 == hashlib.sha256(struct.pack("<3q", 1, 5, 9)).hexdigest()
    assert indices == Indices(np.array([1, 5, 9]))
    assert hash(indices) == hash(Indices(np.array([1, 5, 9])))
    assert indices != Indices(np.array([1, 5, 10]))
    assert indices != [1, 5, 9]


def test_indices_cannot_be_written_to() -> None:
    indices = Indices(np.array([1, 5]))
    with pytest.raises(ValueError, match="read-only"):
        indices.values[0] = 3


@pytest.mark.parametrize(
    "values",
    [
        np.array([5, 1]),
        np.array([1, 1]),
        np.array([-1, 1]),
        np.array([[1, 2]]),
        np.array([1, 2], dtype=np.int32),
        np.array([1.0, 2.0]),
        np.array([1, 2], dtype=np.uint64),
    ],
)
def test_indices_are_increasing_positions(values: Any) -> None:
    with pytest.raises(ValueError, match="indices must be"):
        Indices(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": Cost.zero()}, "fc/lora must cost at least 1"),
        ({"size": 0}, "size of at least 1"),
        ({"gain": math.nan}, "finite"),
        ({"gain": math.inf}, "finite"),
        ({"places": ()}, "occupies no place"),
        ({"places": (W, Place("fc", "bias"))}, "sorted and distinct"),
        ({"places": (W, W)}, "sorted and distinct"),
        ({"indices": Indices(np.array([1, 2, 3]))}, "size 2 but 3 indices"),
    ],
)
def test_an_option_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Option(**GOOD | change)


def test_a_menu_is_blind_to_the_order_it_was_given_in() -> None:
    options = [
        Option(**GOOD | {"size": size, "method": method, "cost": Cost.plain(size, 32)})
        for size in (4, 1, 2)
        for method in ("lora", "core")
    ]
    menu = Menu(tuple(options))
    assert menu == Menu(tuple(reversed(options)))
    assert [(o.method, o.size) for o in menu] == [
        ("core", 1),
        ("core", 2),
        ("core", 4),
        ("lora", 1),
        ("lora", 2),
        ("lora", 4),
    ]
    assert len(menu) == 6
    assert [o.method for o in menu.only(["lora"])] == ["lora"] * 3


def test_the_same_option_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="fc/lora of size 2 is on the menu twice"):
        Menu((Option(**GOOD), Option(**GOOD | {"gain": 0.1})))
