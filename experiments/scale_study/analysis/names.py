"""How methods, bases and amounts are written for people."""

from collections.abc import Iterable

import numpy as np

from experiments.scale_study.analysis.bases import BASES
from experiments.scale_study.analysis.methods import METHODS

# Written for NaN.
MISSING = '–'

HELD_IN = 'held-in: merge ÷ expert'
HELD_OUT = 'held-out: merge ÷ base'


def title(name: str) -> str:
  """Writes the name of a method or base; any other as it is."""
  look = {**METHODS, **BASES}.get(name)
  return look.title if look else name


def amount(parameters: float) -> str:
  """Writes a number of parameters: 121k, 372k, 64B."""
  for unit, name in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if parameters >= unit:
      return f'{parameters / unit:.3g}{name}'
  return f'{parameters:.3g}'


def number(value: float, *, signed: bool = False, digits: int = 2) -> str:
  """Writes a score or a ratio; a dash for NaN."""
  if np.isnan(value):
    return MISSING
  return f'{value:{"+" if signed else ""}.{digits}f}'.replace('-', '−')


def interval(
  value: float,
  low: float,
  high: float,
  *,
  signed: bool = False,
  digits: int = 2,
) -> str:
  """Writes a number and its interval, if it has one."""
  written = [
    number(end, signed=signed, digits=digits) for end in (value, low, high)
  ]
  if np.isnan(low):
    return written[0]
  return f'{written[0]} ({written[1]} to {written[2]})'


def counted(count: int, noun: str) -> str:
  """Writes a number of things: 1 seed, 1,056 merges."""
  return f'{count:,} {noun}{"" if count == 1 else "s"}'


def join(words: Iterable[str]) -> str:
  """Lists words: a, b and c."""
  *first, last = words
  return f'{", ".join(first)} and {last}' if first else last
