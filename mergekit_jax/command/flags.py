"""Turns what stands on the command line into arguments of the library."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
import itertools
import math
import os
import re
from typing import Any, TypeVar

from absl import logging
from jax.sharding import Mesh, PartitionSpec

from mergekit_jax import checks, methods, sharding
from mergekit_jax.checkpoint.remote import is_local
from mergekit_jax.command import names
from mergekit_jax.driving import questions
from mergekit_jax.forecasting import topology

_T = TypeVar('_T')


def all_methods() -> dict[str, Callable[..., Any]]:
  return {name: getattr(methods, name) for name in methods.__all__}


def what_to_merge(arguments: argparse.Namespace) -> dict[str, Any]:
  """The arguments that `merge` and `plan` share; `methods` are {name: rule}."""
  merges = _merges(arguments)
  _demand_apart(arguments.experts)
  overrides = {}
  for override in arguments.override:
    found = re.fullmatch(r'(.+):(base|\w+=.*)', override)
    if not found:
      raise ValueError(
        f'--override {override!r} was given; write it as '
        "'.*/embedding:base' or '.*/mlp/.*:density=0.5'."
      )
    regex, change = found.groups()
    _demand_new('override', regex, overrides)
    if change == 'base':
      overrides[regex] = 'base'
    elif arguments.sweep or len(merges) > 1:
      raise ValueError(
        f'--override {override!r} was given with --sweep or several methods. '
        "Its options would be the same in all merges: give 'REGEX:base', or "
        'one method without --sweep.'
      )
    else:
      make = all_methods()[arguments.method[0]]
      options = _set_options(make, arguments)
      options |= _options(make, change, 'override')
      overrides[regex] = _rule(arguments.method[0], options)
  stacked = {}
  for rule in arguments.stacked_axes:
    regex, axes = _split(rule, 'stacked_axes', '.*/layers/.*=1')
    _demand_new('stacked_axes', regex, stacked)
    stacked[regex] = tuple(_integer('stacked_axes', a) for a in axes.split(','))
  return {
    'methods': merges,
    'experts': arguments.experts,
    'base': arguments.base,
    'mesh': _mesh(arguments),
    'memory_budget': arguments.memory_budget,
    'stacked_axes': stacked or None,
    'overrides': overrides or None,
    'dtype': arguments.dtype,
    'partition_rules': _partition_rules(arguments.partition_rules),
  }


def _demand_apart(experts: Sequence[str]) -> None:
  """Raises ValueError if one path is several that commas join, as it seems."""
  for path in experts:
    _, comma, rest = path.partition(',')
    is_there = not is_local(path) or os.path.exists(os.path.expanduser(path))
    if comma and ('://' in rest or not is_there):
      raise ValueError(
        f'--experts {path!r} was given; separate experts by spaces, as '
        '--experts a b.'
      )


def imagined_devices(arguments: argparse.Namespace) -> int | None:
  """How many CPU devices stand for those of a plan, which need not be there.

  Returns:
    None if devices have to be there.

  Raises:
    ValueError: if there is no mesh of them, or hosts do not divide it.
  """
  model = getattr(arguments, 'model', None)
  hosts = getattr(arguments, 'hosts', None)
  if getattr(arguments, 'topology', None):
    if hosts is not None:
      raise ValueError(
        f'--hosts {hosts} was given for --topology {arguments.topology}, which '
        'says how many hosts there are. Leave --hosts out.'
      )
    return 1  # for what a host answers: the kernels are compiled for TPUs
  if model is None and hosts is None:
    return None
  if not arguments.mesh:
    raise ValueError(
      '--model and --hosts plan for devices that need not be there. Give the '
      "mesh of all of them, as --mesh 'fsdp=256', or TPUs, as --topology "
      'v5e:16x16.'
    )
  devices = math.prod(_mesh_axes(arguments.mesh).values())
  if hosts is not None and (hosts < 1 or devices % hosts):
    raise ValueError(
      f'--hosts {hosts} was given for the {devices} devices of --mesh '
      f'{arguments.mesh}; give a number that divides them.'
    )
  return devices


def number_of_experts(arguments: argparse.Namespace) -> int:
  """How many experts of a described model there are."""
  if arguments.base or len(arguments.experts) > 1:
    raise ValueError(
      f'--model {arguments.model} describes the base and the experts: give no '
      '--base, and the number of experts, as --experts 8.'
    )
  count = _integer('experts', arguments.experts[0])
  if count < 1:
    raise ValueError(f'--experts {count} was given; give at least 1.')
  return count


def bandwidth(text: str | None) -> int | None:
  """Bytes a second from text such as '2GB/s'; None stays None."""
  if text is None:
    return None
  return checks.size('bandwidth', text.removesuffix('/s'))


def seeded(
  arguments: argparse.Namespace, methods: Mapping[str, Any], experts: int
) -> dict[str, tuple[Any, int]]:
  """{name: (rule, seed)}: every merge, of random methods one for each seed.

  Args:
    arguments: of the command line.
    methods: {name: rule}.
    experts: how many are merged.
  """
  seeds = [checks.seed('seed', seed) for seed in arguments.seed or [0]]
  merges = {}
  for name, rule in methods.items():
    if len(seeds) == 1 or not questions.is_random(rule, experts):
      merges[name] = rule, seeds[0]
      continue
    for seed in seeds:
      merges['-'.join(filter(None, [name, f'seed={seed}']))] = rule, seed
  return merges


def outputs(
  arguments: argparse.Namespace, methods: Mapping[str, Any]
) -> dict[str, Any]:
  """Method, output and seed of `merge`: dictionaries if they are several."""
  merges = seeded(arguments, methods, len(arguments.experts))
  if len(methods) == len(merges) == 1:
    ((method, seed),) = merges.values()
    return {'method': method, 'output': arguments.output, 'seed': seed}
  return {
    'method': {name: rule for name, (rule, _) in merges.items()},
    'output': {name: os.path.join(arguments.output, name) for name in merges},
    'seed': {name: seed for name, (_, seed) in merges.items()},
  }


def _merges(arguments: argparse.Namespace) -> dict[str, Any]:
  """{name: rule}: every method with every combination of swept values.

  An option is for the methods that have it. A name tells the merges apart, as
  'ties-scale=0.5': it has the method only if there are several.
  """
  known = all_methods()
  makes = [names.method(name, known) for name in arguments.method]
  sweeps = []
  for sweep in arguments.sweep:
    option, values = _split(sweep, 'sweep', 'scale=0.3,0.5,1')
    names.demand_option('sweep', makes, option)
    items = [f'{option}={value}' for value in values.split(',')]
    sweeps.append((option, items))
  for item in _set_items(arguments):
    names.demand_option('set', makes, _option_of(item))
  merges = {}
  made = set()
  wanted = 0
  for name, make in zip(arguments.method, makes, strict=True):
    own = {option for option, _ in sweeps if names.has(make, option)}
    _doubt(name, {*_set_options(make, arguments), *own})
    choices = [items for option, items in sweeps if option in own]
    wanted += math.prod(map(len, choices))
    for chosen in itertools.product(*choices):
      options = _set_options(make, arguments, chosen)
      parts = [name] if len(arguments.method) > 1 else []
      rule = merges['-'.join([*parts, *chosen])] = _rule(name, options)
      # 0.3 and 0.30 are two names of one value.
      made.add((name, repr(rule)))
  if len(made) < wanted or len(set(arguments.seed)) < len(arguments.seed):
    raise ValueError(
      f'--method {" ".join(arguments.method)}, --sweep or --seed names the '
      'same merge twice. Give each method and value once.'
    )
  return merges


def _rule(method: str, options: Mapping[str, Any]) -> Any:
  """A method's rule; of several methods, an error says which refuses what."""
  try:
    return all_methods()[method](**options)
  except ValueError as error:
    raise ValueError(f'{method}: {error}') from error


def _doubt(method: str, given: Collection[str]) -> None:
  """Warns where another library means one thing by an option, and we two."""
  if method == 'dare_ties' and 'density' in given and 'drop_rate' not in given:
    logging.warning(
      'dare_ties: a density trims before the drop is made up for, and the drop '
      'rate stays 0.9. What mergekit and PEFT call density is 1 - drop_rate: '
      'give --set drop_rate=... instead, or both.'
    )


def _set_options(
  make: Callable[..., Any],
  arguments: argparse.Namespace,
  swept: Sequence[str] = (),
) -> dict[str, Any]:
  """What --set and a sweep say of a method's options, and --weights."""
  items = [
    item for item in _set_items(arguments) if names.has(make, _option_of(item))
  ]
  options = _options(make, ','.join([*items, *swept]))
  if arguments.weights:
    texts = ','.join(arguments.weights).split(',')
    options['weights'] = tuple(_number('weights', text) for text in texts)
  return options


def _set_items(arguments: argparse.Namespace) -> list[str]:
  return [item for text in arguments.set for item in text.split(',') if item]


def _option_of(item: str) -> str:
  return _split(item, 'set', 'density=0.2')[0]


def _options(
  make: Callable[..., Any], text: str, flag: str = 'set'
) -> dict[str, Any]:
  """'density=0.2,scope=tensor' of a flag as keyword arguments of a method.

  Raises:
    ValueError: if an option is unknown, with the nearest names.
  """
  options = {}
  for item in filter(None, text.split(',')):
    name, value = _split(item, flag, 'density=0.2')
    names.demand_option(flag, [make], name)
    if name in options:
      raise ValueError(
        f'{name} was given twice, as {options[name]!r} and as {value!r}. Give '
        'an option once in --set or --sweep, and once in an --override.'
      )
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
    _demand_new('partition_rules', regex, specs)
    entries = [
      None if axis == '-' else tuple(axis.split('+'))
      for axis in axes.split(',')
    ]
    specs[regex] = PartitionSpec(*entries)
  return specs or None


def _mesh(arguments: argparse.Namespace) -> Mesh:
  axes = _mesh_axes(arguments.mesh) if arguments.mesh else None
  name = getattr(arguments, 'topology', None)
  return sharding.make_mesh(axes, topology.tpus(name) if name else None)


def _mesh_axes(text: str) -> dict[str, int]:
  axes = {}
  for item in text.split(','):
    name, size = _split(item, 'mesh', 'fsdp=4,tensor=2')
    if name in axes:
      raise ValueError(f'--mesh {text!r} names the axis {name!r} twice.')
    axes[name] = _integer('mesh', size)
  return axes


def _demand_new(flag: str, regex: str, given: Collection[str]) -> None:
  """Raises ValueError if a flag names an expression for the second time."""
  if regex in given:
    raise ValueError(f'--{flag} names {regex!r} twice; give it once.')


def _split(text: str, flag: str, example: str) -> tuple[str, str]:
  """Splits at the last '=': an expression may hold one too."""
  before, found, after = text.rpartition('=')
  if not found or not before:
    raise ValueError(f'--{flag} {text!r} was given; write it as {example!r}.')
  return before, after


def _integer(flag: str, text: str) -> int:
  return _read(flag, text, int, 'a whole number')


def _number(flag: str, text: str) -> float:
  return _read(flag, text, float, 'a number')


def _read(flag: str, text: str, kind: Callable[[str], _T], what: str) -> _T:
  try:
    return kind(text)
  except ValueError as error:
    raise ValueError(
      f'--{flag}: {text!r} was given where {what} is expected.'
    ) from error
