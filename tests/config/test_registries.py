from __future__ import annotations

import dataclasses

import pytest

from autopeft.config.plugin import Plugin, describe
from autopeft.config.registries import ROOMS

NAMES = [(room, name) for room, registry in ROOMS.items() for name in registry]


def test_every_room_has_plugins_under_the_group_of_its_name() -> None:
    for room, registry in ROOMS.items():
        assert list(registry), room
        assert registry.group == f"autopeft.{room}"


@pytest.mark.parametrize(("room", "name"), NAMES)
def test_a_builtin_plugin_is_a_frozen_dataclass_that_its_own_description_gives_back(room: str, name: str) -> None:
    cls = ROOMS[room][name]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__
    assert ROOMS[room].name_of(cls) == name
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if not required:
        assert Plugin(room).read(describe(cls(), room)) == cls()
