"""Turns what stands on the command line into arguments of the library."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import inspect
import re
from typing import Any

from jax.sharding import PartitionSpec

from mergekit_jax import checks, methods, sharding


def all_methods() -> dict[str, Callable[..., Any]]:
  return {name: getattr(methods, name) for name in methods.__all__}


def what_to_merge(arguments: argparse.Namespace) -> dict[str, Any]:
  """The arguments that `merge` and `plan` share."""
  methods = all_methods()
  make = methods[checks.one_of('method', arguments.method, list(methods))]
  options = _options(make, ','.join(arguments.set))
  if arguments.weights:
    options['weights'] = tuple(arguments.weights)
  overrides = {}
  for override in arguments.override:
    found = re.fullmatch(r'(.+):(base|\w+=.*)', override)
    if not found:
      raise ValueError(
        f'--override {override!r} was given; write it as '
        "'.*/embedding:base' or '.*/mlp/.*:density=0.5'."
      )
    regex, change = found.groups()
    if change == 'base':
      overrides[regex] = 'base'
    else:
      overrides[regex] = make(**options | _options(make, change))
  stacked = {}
  for rule in arguments.stacked_axes:
    regex, axes = _split(rule, 'stacked_axes', '.*/layers/.*=1')
    stacked[regex] = tuple(_integer('stacked_axes', a) for a in axes.split(','))
  axes = _mesh_axes(arguments.mesh) if arguments.mesh else None
  return {
    'method': make(**options),
    'experts': arguments.experts,
    'base': arguments.base,
    'mesh': sharding.make_mesh(axes),
    'memory_budget': arguments.memory_budget,
    'stacked_axes': stacked or None,
    'overrides': overrides or None,
    'dtype': arguments.dtype,
    'partition_rules': _partition_rules(arguments.partition_rules),
  }


def _options(make: Callable[..., Any], text: str) -> dict[str, Any]:
  """'density=0.2,scope=tensor' as keyword arguments of a method.

  Raises:
    ValueError: if an option is unknown, with the nearest names.
  """
  known = list(inspect.signature(make).parameters)
  options = {}
  for item in filter(None, text.split(',')):
    name, value = _split(item, 'set', 'density=0.2')
    if name == 'weights':
      raise ValueError('Give weights with --weights W1 W2 ..., not with --set.')
    checks.one_of(f'option of {make.__name__}', name, known)
    options[name] = _value(value)
  return options


def _value(text: str) -> Any:
  if text.lower() == 'none':
    return None
  try:
    return float(text)
  except ValueError:
    return text


def _partition_rules(rules: Sequence[str]) -> dict[str, Any] | None:
  specs = {}
  for rule in rules:
    regex, axes = _split(rule, 'partition_rules', '.*/kernel=fsdp,-')
    entries = [
      None if axis == '-' else tuple(axis.split('+'))
      for axis in axes.split(',')
    ]
    specs[regex] = PartitionSpec(*entries)
  return specs or None


def _mesh_axes(text: str) -> dict[str, int]:
  axes = {}
  for item in text.split(','):
    name, size = _split(item, 'mesh', 'fsdp=4,tensor=2')
    if name in axes:
      raise ValueError(f'--mesh {text!r} names the axis {name!r} twice.')
    axes[name] = _integer('mesh', size)
  return axes


def _split(text: str, flag: str, example: str) -> tuple[str, str]:
  """Splits at the last '=': an expression may hold one too."""
  before, found, after = text.rpartition('=')
  if not found or not before:
    raise ValueError(f'--{flag} {text!r} was given; write it as {example!r}.')
  return before, after


def _integer(flag: str, text: str) -> int:
  try:
    return int(text)
  except ValueError as error:
    raise ValueError(
      f'--{flag}: {text!r} was given where a whole number is expected.'
    ) from error
