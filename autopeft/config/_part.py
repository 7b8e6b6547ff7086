"""A frozen dataclass to a strict pydantic schema, and pydantic's errors to sentences."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from autopeft.config._guess import known_names
from autopeft.core import contracts
from autopeft.errors import UnknownKey, UsageError

__all__ = ["Fault", "Part", "explain", "fields_of", "nested", "readable", "refuse", "validate"]

_CONTRACTS = tuple(getattr(contracts, name) for name in contracts.__all__)

_STRICT = ConfigDict(strict=True)
_STRICT_CORE = core_schema.CoreConfig(strict=True)
"""Again for every part: a schema with fields does not hand the outer configuration down to them."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "none_required": "null",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        path: keys from the top to the place.
        message: what is wrong there; the path is put before it unless `whole`.
        kind: the class of the exception to raise.
        whole: whether the message stands after the path without a colon, as in `has no key`.
    """

    path: tuple[str, ...]
    message: str
    kind: type[UsageError] = UsageError
    whole: bool = False

    def text(self, root: str) -> str:
        """The sentence, for data called `root`."""
        where = ".".join((root, *self.path))
        if where == "study" and not self.whole:
            return self.message
        if self.whole:
            return f"{where} {self.message}"
        # The values' own checks mostly name the field themselves.
        named = self.path and self.kind is UsageError and self.message.startswith(f"{self.path[-1]}.")
        return self.message if named else f"{where}: {self.message}"


def refuse(message: str, kind: type[UsageError] = UsageError, *, whole: bool = False) -> PydanticCustomError:
    """The error a validator raises; pydantic adds the place."""
    return nested([Fault((), message, kind, whole)])


def nested(faults: list[Fault]) -> PydanticCustomError:
    """Faults of a value inside, whose paths continue where pydantic's ends."""
    return PydanticCustomError("autopeft", "see faults", {"faults": faults})


def fields_of(cls: type) -> dict[str, Any]:
    """Configurable fields of a dataclass with their annotations.

    A field that is typed as a contract and not marked as a plug-in, or that is kept out of the `repr`, is set by the
    program and not by a study file: such as the methods SPT may buy, which are the study's. A plug-in that holds others
    marks the field by `metadata={"plugin": ROOM}` for one, `{"plugins": ROOM}` for a list: its room lies below the one
    that knows the registries.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for f in dataclasses.fields(cls):
        if f.init and f.repr:
            hint = _held(f) or hints[f.name]
            if not _is_wired(hint):
                found[f.name] = hint
    return found


def _held(field: dataclasses.Field[Any]) -> Any:
    """The annotation of a field that holds plug-ins, None for any other."""
    from autopeft.config.plugin import Plugin, PluginList

    if "plugin" in field.metadata:
        return Annotated[Any, Plugin(field.metadata["plugin"])]
    return Annotated[Any, PluginList(field.metadata["plugins"])] if "plugins" in field.metadata else None


def _is_wired(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return False
    return hint in _CONTRACTS or any(_is_wired(arg) for arg in get_args(hint))


def readable(hint: Any) -> Any:
    """The annotation with every dataclass in it marked as a `Part` and every union as one choice."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return Part(hint).annotation
    if origin is Annotated or origin is Literal or not args:
        return hint
    if origin in (Union, types.UnionType):
        kinds = [readable(arg) for arg in args if arg is not type(None)]
        inner = kinds[0] if len(kinds) == 1 else Annotated[Any, _Choice(tuple(kinds))]
        return inner if len(kinds) == len(args) else Annotated[Any, _OrNull(inner)]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[str, readable(args[1])]  # type: ignore[misc]  # built from a value, not from a type
    if origin is tuple:
        return Annotated[
            Any, _ListAsTuple(tuple(readable(arg) for arg in args if arg is not Ellipsis), Ellipsis in args)
        ]
    return origin[tuple(readable(arg) for arg in args)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    """A value of one of several types, with one message for all of them."""

    kinds: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        names = [_spoken(kind) for kind in self.kinds]
        return core_schema.union_schema(
            [handler.generate_schema(kind) for kind in self.kinds],
            custom_error_type="choice",
            custom_error_message=f"expected {' or '.join(names)}",
        )


def _spoken(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    names: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names[kind] if kind in names else str(getattr(kind, "__name__", kind))


@dataclasses.dataclass(frozen=True, slots=True)
class _OrNull:
    """A value or nothing."""

    kind: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.nullable_schema(handler.generate_schema(self.kind))


@dataclasses.dataclass(frozen=True, slots=True)
class _ListAsTuple:
    """A tuple that a file writes as a list."""

    items: tuple[Any, ...]
    variadic: bool

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.tuple_schema(
            [handler.generate_schema(item) for item in self.items],
            variadic_item_index=0 if self.variadic else None,
            strict=False,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Marks a field that holds a frozen dataclass: its own keys and no others, then its own checks."""

    cls: type

    @property
    def annotation(self) -> Any:
        """The annotation that `validate` takes."""
        return Annotated[Any, self]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        required = {
            f.name
            for f in dataclasses.fields(self.cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        hints = fields_of(self.cls)
        fields = {
            name: core_schema.typed_dict_field(handler.generate_schema(readable(hint)), required=name in required)
            for name, hint in hints.items()
        }
        keys = core_schema.typed_dict_schema(fields, extra_behavior="forbid", strict=True, config=_STRICT_CORE)
        return core_schema.chain_schema(
            [
                core_schema.no_info_plain_validator_function(lambda data: self._known_keys(data, tuple(hints))),
                keys,
                core_schema.no_info_plain_validator_function(self._construct),
            ]
        )

    def _known_keys(self, data: Any, known: tuple[str, ...]) -> Any:
        if not isinstance(data, dict):
            raise refuse(f"expected a mapping with keys among {', '.join(known) or 'none'}, got {data!r}")
        for key in data:
            if key not in known:
                raise refuse(f"has no key {key!r}. {known_names(key, known)}", UnknownKey, whole=True)
        return data

    def _construct(self, values: dict[str, Any]) -> Any:
        try:
            return self.cls(**values)
        except UsageError as error:
            raise refuse(str(error), type(error)) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise refuse(f"{type(error).__name__}: {error}") from error


def validate(hint: Any, data: Any) -> Any:
    """The value that `data` describes: nothing is converted but a whole number to a float and a list to a tuple.

    Args:
        hint: a dataclass, or an annotation with markers.
        data: plain data.

    Raises:
        PydanticCustomError: with the `Fault`s.
    """
    try:
        return _adapter(hint).validate_python(data)
    except ValidationError as error:
        raise nested(list(_faults(error))) from error


@functools.lru_cache(maxsize=256)
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(readable(hint), config=_STRICT)


def _faults(error: ValidationError) -> typing.Iterator[Fault]:
    for detail in error.errors(include_url=False):
        path = tuple(str(part) for part in detail["loc"])
        if detail["type"] == "autopeft":
            for fault in detail["ctx"]["faults"]:
                yield dataclasses.replace(fault, path=path + fault.path)
        elif detail["type"] == "missing" and isinstance(detail["loc"][-1], int):
            yield Fault(path[:-1], f"expected a longer list, got {detail['input']!r}")
        elif detail["type"] == "missing":
            yield Fault(path[:-1], f"the key {path[-1]!r} is missing")
        elif detail["type"] == "literal_error":
            guess = detail["ctx"]["expected"]
            yield Fault(path, f"expected {guess}, got {detail['input']!r}")
        elif detail["type"] == "choice":
            yield Fault(path, f"{detail['msg']}, got {detail['input']!r}")
        elif detail["type"] in _EXPECTED:
            yield Fault(path, f"expected {_EXPECTED[detail['type']]}, got {detail['input']!r}")
        else:
            yield Fault(path, f"{detail['msg']}, got {detail['input']!r}")


def explain(error: PydanticCustomError, root: str) -> UsageError:
    """The exception for a person: every fault in a line of its own, of the class of the first."""
    faults: list[Fault] = (error.context or {})["faults"]
    return faults[0].kind("\n".join(fault.text(root) for fault in faults))
