"""Values to JSON and back, strictly: unknown keys, missing keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from autopeft.core.menu import Indices
from autopeft.errors import CorruptFile, UsageError

__all__ = ["decode", "encode"]

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Plain JSON data of a frozen dataclass, a mapping, a sequence or a scalar.

    A class with a `SCHEMA` writes it first. Indices are written as their digest alone: their positions live in a
    file beside the JSON.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Indices):
            return {"sha256": value.sha256, "n": len(value)}
        data: dict[str, Any] = {}
        schema = getattr(type(value), "SCHEMA", None)
        if schema is not None:
            data["schema"] = schema
        for f in dataclasses.fields(value):
            data[f.name] = encode(getattr(value, f.name))
        return data
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def decode(cls: type[T], data: Any, where: str = "") -> T:
    """The value of class `cls` that `encode` wrote.

    Args:
        cls: a dataclass of plain fields.
        data: parsed JSON.
        where: what to call the data in messages: a file name.

    Raises:
        CorruptFile: naming the place, when the data does not have the shape of the class.
    """
    result: T = _decode(cls, data, where or cls.__name__)
    return result


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, where)
    if origin is Literal:
        if data not in args:
            raise CorruptFile(f"{where}: expected one of {args}, found {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise CorruptFile(f"{where}: expected a list, found {data!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
        if len(args) != len(data):
            raise CorruptFile(f"{where}: expected {len(args)} values, found {len(data)}")
        return tuple(_decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise CorruptFile(f"{where}: expected an object, found {data!r}")
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    return _decode_scalar(kind, data, where)


def _decode_union(args: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in args:
        return None
    problem: CorruptFile | None = None
    # A whole number is also a float: in `float | int` it must stay what it is.
    for arg in sorted(args, key=lambda arg: arg is not type(data)):
        if arg is type(None):
            continue
        try:
            return _decode(arg, data, where)
        except CorruptFile as error:
            problem = problem or error
    raise problem or CorruptFile(f"{where}: unexpected {data!r}")


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise CorruptFile(f"{where}: expected an object, found {data!r}")
    data = dict(data)
    schema = getattr(kind, "SCHEMA", None)
    if schema is not None:
        found = data.pop("schema", schema)
        if found != schema:
            raise CorruptFile(f"{where}: written in format {found!r}, this version reads {schema!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise CorruptFile(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{where}.{name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise CorruptFile(f"{where}: the key {name!r} is missing")
    try:
        return kind(**values)
    except (UsageError, ValueError) as error:
        raise CorruptFile(f"{where}: {error}") from error


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if kind is float and data in ("nan", "inf", "-inf"):
        return float(data)
    if isinstance(kind, type) and isinstance(data, kind) and (kind is bool or not isinstance(data, bool)):
        return data
    raise CorruptFile(f"{where}: expected {getattr(kind, '__name__', kind)}, found {data!r}")
