"""Dataclasses from JSON, checked field by field."""

from collections.abc import Mapping
import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal


def from_json(cls: Any, entry: Any) -> Any:
  """Makes a frozen dataclass from a parsed JSON object.

  Args:
    cls: the dataclass; lists become its tuples.
    entry: what `json.loads` returned.

  Raises:
    ValueError: the fields or their types are not those of the class.
  """
  if not isinstance(entry, dict):
    raise ValueError(f'expected an object, got {entry!r}')
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(entry) - set(fields))
  missing = [
    name
    for name, field in fields.items()
    if name not in entry
    and field.default is field.default_factory is dataclasses.MISSING
  ]
  if unknown or missing:
    raise ValueError(f'fields missing: {missing}; fields unknown: {unknown}')
  record = cls(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in entry.items()
    }
  )
  problems = type_problems(record)
  if problems:
    raise ValueError('; '.join(problems))
  return record


def type_problems(record: Any) -> list[str]:
  """Names the fields of a dataclass that do not hold what they declare."""
  hints = _hints(type(record))
  return [
    f'{name} is {getattr(record, name)!r}, not {_words(hint)}'
    for name, hint in hints.items()
    if not _fits(getattr(record, name), hint)
  ]


# Of thousands of records there are few types.
_hints = functools.cache(typing.get_type_hints)


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
  return typing.get_origin(hint), typing.get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
  origin, arguments = _parts(hint)
  if hint is Any:
    return True
  if origin is Literal:
    return value in arguments
  if origin in (types.UnionType, typing.Union):
    return any(_fits(value, argument) for argument in arguments)
  if origin is tuple:
    return isinstance(value, tuple) and all(
      _fits(item, arguments[0]) for item in value
    )
  if origin is not None:
    return isinstance(value, Mapping) and all(
      isinstance(key, str) and _fits(item, arguments[1])
      for key, item in value.items()
    )
  # bool is an int to Python, and NaN a number to JSON's reader: neither here.
  if hint is float:
    return _is_number(value, (int, float)) and math.isfinite(value)
  return _is_number(value, int) if hint is int else isinstance(value, hint)


def _is_number(value: Any, kinds: Any) -> bool:
  return isinstance(value, kinds) and not isinstance(value, bool)


def _words(hint: Any) -> str:
  if typing.get_origin(hint) is Literal:
    return f'one of {list(typing.get_args(hint))}'
  if typing.get_origin(hint) is None:
    return f'a finite {hint.__name__}' if hint is float else hint.__name__
  return str(hint).replace('collections.abc.', '')
