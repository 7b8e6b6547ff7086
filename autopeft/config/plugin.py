"""How a field of a study holds a plug-in: by name, or by name and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from autopeft.config._part import Fault, Part, fields_of, nested, refuse, validate
from autopeft.config.registries import ROOMS
from autopeft.core import codec
from autopeft.errors import UnknownPlugin

__all__ = ["Plugin", "PluginList", "PluginTable", "describe"]


@dataclass(frozen=True, slots=True)
class Plugin:
    """Marks a field that holds one plug-in: `Annotated[Scorer, Plugin("scoring")]`.

    In a study file it is `scorer: fisher`, or `scorer: {type: fisher, power: 0.5}`. The plug-in's module is imported
    when its name is read, not before.

    Attributes:
        room: the room whose registry knows the names.
    """

    room: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A schema that never looks at the contract: pydantic cannot make one of a protocol."""
        return core_schema.no_info_plain_validator_function(self.read)

    def read(self, data: Any) -> Any:
        """The plug-in that a name, or a mapping with `type` and settings, describes.

        Raises:
            PydanticCustomError: for an unknown name, an unknown setting or a value that is refused.
        """
        registry = ROOMS[self.room]
        if isinstance(data, str):
            data = {"type": data}
        if not isinstance(data, dict):
            raise refuse(f"expected the name of a {registry.noun}, or a mapping with `type` and settings, got {data!r}")
        settings = dict(data)
        name = settings.pop("type", None)
        if not isinstance(name, str):
            raise refuse(f"a {registry.noun} needs `type`, one of {', '.join(registry)}")
        try:
            cls = registry[name]
        except UnknownPlugin as error:
            raise refuse(str(error), UnknownPlugin) from error
        return validate(Part(cls).annotation, settings)


@dataclass(frozen=True, slots=True)
class PluginList:
    """Marks a field that holds a tuple of plug-ins, written as a list of what `Plugin` reads.

    Attributes:
        room: the room whose registry knows the names.
    """

    room: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """As `Plugin`'s."""
        return core_schema.no_info_plain_validator_function(self.read)

    def read(self, data: Any) -> tuple[Any, ...]:
        """The plug-ins that a list describes.

        Raises:
            PydanticCustomError: with every fault of every plug-in.
        """
        if not isinstance(data, list):
            raise refuse(f"expected a list of {ROOMS[self.room].noun}s, got {data!r}")
        found: list[Any] = []
        faults: list[Fault] = []
        for i, item in enumerate(data):
            try:
                found.append(Plugin(self.room).read(item))
            except PydanticCustomError as error:
                for fault in (error.context or {})["faults"]:
                    faults.append(Fault((str(i), *fault.path), fault.message, fault.kind, fault.whole))
        if faults:
            raise nested(faults)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class PluginTable:
    """Marks a field that holds named plug-ins: `Annotated[Mapping[str, Method], PluginTable("methods", presets)]`.

    In a study file it is a list of names, or a mapping of names to settings. A name stands for the plug-in of that
    name, or for a preset; with `type` it may be any name.

    Attributes:
        room: the room whose registry knows the types.
        presets: names that stand for a type with settings.
        grows: whether setting something of a plug-in that is not in the table puts it there.
    """

    room: str
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    grows: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """As `Plugin`'s."""
        return core_schema.no_info_plain_validator_function(self.read)

    def read(self, data: Any) -> dict[str, Any]:
        """The plug-ins that a list of names, or a mapping of names to settings, describes, in its order.

        Raises:
            PydanticCustomError: with every fault of every plug-in.
        """
        noun = ROOMS[self.room].noun
        if isinstance(data, list) and all(isinstance(name, str) for name in data):
            twice = sorted({name for name in data if data.count(name) > 1})
            if twice:
                raise refuse(f"the {noun} {twice[0]!r} is listed twice")
            data = dict.fromkeys(data)
        if not isinstance(data, dict):
            raise refuse(f"expected a list of {noun}s, or a mapping of names to settings, got {data!r}")
        found: dict[str, Any] = {}
        faults: list[Fault] = []
        for name, settings in data.items():
            try:
                found[name] = Plugin(self.room).read(self._filled(name, settings))
            except PydanticCustomError as error:
                for fault in (error.context or {})["faults"]:
                    faults.append(Fault((name, *fault.path), fault.message, fault.kind, fault.whole))
        if faults:
            raise nested(faults)
        return found

    def _filled(self, name: str, settings: Any) -> Any:
        """The settings with the type that the name stands for, unless they name another."""
        if settings is None:
            settings = {}
        if not isinstance(settings, dict):
            return settings
        meant = self.presets.get(name, {"type": name})
        return {**meant, **settings} if settings.get("type", meant["type"]) == meant["type"] else settings


def describe(plugin: Any, room: str) -> dict[str, Any]:
    """Plain data that `Plugin.read` gives an equal plug-in for: its type and every setting.

    Raises:
        UnknownPlugin: when the plug-in's class is not registered.
    """
    settings = {name: _described(hint, getattr(plugin, name)) for name, hint in fields_of(type(plugin)).items()}
    return {"type": ROOMS[room].name_of(type(plugin)), **settings}


def _described(hint: Any, value: Any) -> Any:
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Plugin):
            return describe(value, mark.room)
        if isinstance(mark, PluginList):
            return [describe(plugin, mark.room) for plugin in value]
    return codec.encode(value)
