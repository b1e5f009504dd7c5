"""Names of methods, options and flags, also those of who comes from elsewhere.

Only on the command line: the library knows no names but its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
import inspect
from typing import Any, TypeVar

from mergekit_jax import checks

_T = TypeVar('_T')

# What mergekit's names are here. The last word is our name.
_ELSEWHERE = {
  'linear': 'average',
  'dare_linear': 'dare',
  'lambda': 'scale',
  'density': '1 - drop_rate',
  'normalize': 'combine',
  'models': '--experts',
  'base_model': '--base',
}

# And what its values are, where they have other names too.
_VALUES = {'normalize': 'True is combine=mean, false combine=sum.'}

# Where to give weights, which are several numbers, instead of with a flag.
_WEIGHTS = {
  'set': 'Give them with --weights W1 W2 ...',
  'sweep': 'In Python they can be swept: give merge_checkpoints or sweep '
  '{name: mk.ties(weights=...)}.',
  'override': 'In Python they can be overridden: give merge_checkpoints '
  'overrides={regex: mk.ties(weights=...)}.',
}


def nearest(given: str, known: Collection[str]) -> str:
  """What a name of mergekit is here, else the nearest names, or nothing."""
  name = given.removeprefix('--').replace('-', '_').lower()
  ours = _ELSEWHERE.get(name, '')
  if ours.rpartition(' ')[2] in known:
    values = f' {_VALUES[name]}' if name in _VALUES else ''
    return f' What mergekit calls {name} is {ours} here.{values}'
  return checks.nearest(given.lower(), [*known])


def method(name: str, known: Mapping[str, _T]) -> _T:
  """The method of a name; ValueError, with a hint, if there is none."""
  if name not in known:
    raise ValueError(
      f'method={name!r} was given; it is one of '
      f'{", ".join(map(repr, known))}.{nearest(name, known)}'
    )
  return known[name]


def has(make: Callable[..., Any], option: str) -> bool:
  """Whether a method has an option."""
  return option in inspect.signature(make).parameters


def demand_option(
  flag: str, makes: Sequence[Callable[..., Any]], option: str
) -> None:
  """Raises ValueError, with a hint, if no method has the option of a flag."""
  if option == 'weights':
    raise ValueError(f'--{flag} takes no weights. {_WEIGHTS[flag]}')
  if any(has(make, option) for make in makes):
    return
  options = (x for make in makes for x in inspect.signature(make).parameters)
  known = dict.fromkeys(options)
  names = dict.fromkeys(make.__name__ for make in makes)
  raise ValueError(
    f'{" and ".join(names)} {"has" if len(names) == 1 else "have"} no option '
    f'{option!r}; there is {", ".join(known)}.{nearest(option, known)}'
  )
