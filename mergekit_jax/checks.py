"""Checks of arguments, for the functions that people call.

Values under a JAX trace have no value to check, and pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import difflib
import functools
import inspect
import math
import os
import re
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

_UNITS = {'': 1, 'k': 10**3, 'm': 10**6, 'g': 10**9, 't': 10**12}
_UNITS |= {'ki': 2**10, 'mi': 2**20, 'gi': 2**30, 'ti': 2**40}

# Weights that are divided by their sum: from 1e-18 to 1e18 in any dtype, which
# leaves room in float32 for their products with parameters.
_ORDINARY = (2.0**-60, 2.0**60)


def _is_traced(x: Any) -> bool:
  return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))


def number(name: str, value: Any) -> Any:
  """Returns the value, a Python int as a float; ValueError if not real.

  One type for all Python numbers: `scale=2` and `scale=2.0` compile once. Of
  arrays, traced ones too, the dtype says it.
  """
  if isinstance(value, (jax.Array, np.ndarray, np.generic)):
    kinds = (np.integer, np.floating)
    if any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
      return value
  elif isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  raise ValueError(f'{name}={value!r} was given; give a real number.')


def one(name: str, value: Any) -> Any:
  """Returns the number of a merge; ValueError if it is an array of several."""
  if shape := np.shape(value):
    raise ValueError(
      f'{name} is an array of shape {shape}; a merge takes one number. For '
      'a merge with each, map over the method (jax.vmap) or call sweep.'
    )
  return value


def finite(name: str, value: Any) -> Any:
  """Returns the value as `number` does; ValueError unless it is finite."""
  value = number(name, value)
  if not _is_traced(value) and not np.isfinite(value).all():
    raise ValueError(f'{name}={value!r} was given; give a finite number.')
  return value


def within(
  name: str,
  value: Any,
  low: float,
  high: float,
  closed: tuple[bool, bool],
) -> Any:
  """Returns the value; ValueError unless it lies in the interval.

  Args:
    name: the argument's name.
    value: a number, an array, or a traced value, which passes.
    low: lower end.
    high: upper end.
    closed: whether the lower and the upper end are allowed themselves.
  """
  value = number(name, value)
  if not _is_traced(value):
    above = value >= low if closed[0] else value > low
    below = value <= high if closed[1] else value < high
    if not np.all(above & below):
      interval = f'{"[" if closed[0] else "("}{low}, {high}'
      interval += ']' if closed[1] else ')'
      raise ValueError(
        f'{name}={value!r} was given; it is a fraction in {interval}.'
      )
  return value


def by_path(name: str, value: Any) -> None:
  """Raises ValueError unless rules by path are a dictionary, or None."""
  if not isinstance(value, (Mapping, type(None))):
    raise ValueError(
      f'{name}={value!r} was given; give a dictionary by regular expression of '
      'a path.'
    )
  for expression in value or {}:
    # What a resume compares and a report says is JSON, with no other keys.
    if not isinstance(expression, str):
      raise ValueError(
        f'{name}: {expression!r} was given for a regular expression; give its '
        'text.'
      )


def takes(function: Any, count: int) -> bool:
  """Whether a function can be called with so many arguments, if it says so."""
  try:
    # Of what is wrapped, only the wrapper knows what it adds to a call.
    signature = inspect.signature(function, follow_wrapped=False)
  except ValueError:
    return True
  try:
    signature.bind(*[None] * count)
  except TypeError:
    return False
  return True


def some_rules(name: str, value: Any) -> None:
  """Raises ValueError if {name: rule} is empty."""
  if isinstance(value, Mapping) and not value:
    raise ValueError(f'{name} is empty; give {{name: rule}} of at least one.')


def seed(name: str, value: Any) -> int:
  """Returns the seed; ValueError unless it is a whole number of 32 bits.

  JAX cuts longer ones short or not, as 64-bit types are on or off.
  """
  whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not whole or not 0 <= value < 2**32:
    raise ValueError(
      f'{name}={value!r} was given; give a whole number from 0 to 2**32 - 1.'
    )
  return int(value)


def weights(values: Any, at_least: float = -math.inf) -> Any:
  """Returns the weights as a tuple; None stays None.

  Raises:
    ValueError: unless all are finite numbers and none is below `at_least`; if
      negative weights are refused, one must be above zero, and none far from 1.
  """
  if values is None:
    return None
  if not isinstance(values, Iterable) or getattr(values, 'ndim', 1) == 0:
    raise ValueError(
      f'weights={values!r} was given; give one number an expert.'
    )
  values = tuple(finite('weight', value) for value in values)
  if not _is_traced(values):
    for value in values:
      if np.any(value < at_least):
        raise ValueError(
          f'weights={values!r} were given; this method divides by their sum '
          'and needs weights of 0 or more.'
        )
    # Of arrays, each entry is a merge of its own under `jax.vmap`.
    some = functools.reduce(np.logical_or, values, False)
    if at_least == 0 and not np.all(some):
      raise ValueError('All weights are 0; give at least one above 0.')
    if at_least == 0:
      _demand_ordinary(values)
  return values


def _demand_ordinary(values: Sequence[Any]) -> None:
  """Refuses weights with which float32 does not hold all that is made of them.

  Sums, their reciprocals, and products with parameters: below 1e-38 they become
  0, above 3e38 infinite.
  """
  low, high = _ORDINARY
  for value in values:
    sizes = np.asarray(value, np.float64)
    if np.any((sizes != 0) & ((sizes < low) | (sizes > high))):
      raise ValueError(
        f'weights={values!r} were given; give 0, or numbers between 1e-18 and '
        '1e18: only their ratios matter.'
      )


def experts(given: Any) -> list[Any]:
  """Returns the experts as a list; ValueError if they are one, or none."""
  one = isinstance(given, (str, bytes, os.PathLike, Mapping))
  if one or not isinstance(given, Iterable):
    raise ValueError(
      f'experts is one {type(given).__name__}; give a list, with a tree or '
      'checkpoint an expert.'
    )
  listed = list(given)
  if not listed:
    raise ValueError('No experts were given; give a list of at least one.')
  return listed


def size(name: str, value: int | str) -> int:
  """Bytes from a number, or from text such as '512MiB' or '4GB'.

  Raises:
    ValueError: if the value is neither, or not above zero.
  """
  match = re.fullmatch(
    r'\s*(\d+\.?\d*|\.\d+)\s*([kmgt]i?)?b?\s*', str(value).lower()
  )
  count = int(float(match[1]) * _UNITS[match[2] or '']) if match else 0
  if count < 1:
    raise ValueError(
      f'{name}={value!r} was given; give bytes, or text such as '
      "'512MiB' or '4GiB'."
    )
  return count


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
  """Returns the value; ValueError with the nearest one if it is not allowed."""
  if value not in allowed:
    raise ValueError(
      f'{name}={value!r} was given; it is one of '
      f'{", ".join(map(repr, allowed))}.{nearest(value, allowed)}'
    )
  return value


def nearest(given: str, known: Sequence[str]) -> str:
  """' Did you mean ...?' with the nearest known names, or nothing."""
  close = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
  return f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
