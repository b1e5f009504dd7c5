"""Which leaves are merged by which rule, and which share their totals."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
import inspect
from typing import Any

import jax

from mergekit_jax import checks, tree
from mergekit_jax.rule import NEEDS, needs_of, scope_of, SCOPES

Group = tuple[tuple[Any, ...], list[str]]


def agreed(
  methods: Sequence[Any],
  overrides: Mapping[str, Any] | None,
  reference: Mapping[str, Any],
  others: Mapping[str, Mapping[str, Any]],
  whole: Iterable[str] = (),
) -> list[Group]:
  """Groups the leaves that are merged, in which all models agree.

  Args:
    methods: as for `group`.
    overrides: as for `group`. What they keep as the base has it may differ.
    reference: the leaves (anything with a shape and a dtype) of the first
      model, by path.
    others: likewise, of the others, by what to call them.
    whole: paths of the first model, those beside its parameters too.

  Returns:
    What `group` gives.

  Raises:
    ValueError: as `group`, or if the models differ.
  """
  paths = [
    *tree.merged_shapes(reference),
    *tree.only_in(others.values(), reference),
  ]
  groups = group(methods, overrides, paths, whole)
  covered = {path for _, paths in groups for path in paths}
  # Leaves that are floating point in no model are the first one's anyway.
  models = (reference, *others.values())
  copied = {path for model in models for path in model}.difference(
    *(tree.merged_shapes(model) for model in models)
  )
  tree.demand_same(reference, others, kept=({*paths} - covered) | copied)
  return groups


def group(
  methods: Sequence[Any],
  overrides: Mapping[str, Any] | None,
  paths: Iterable[str],
  whole: Iterable[str] = (),
) -> list[Group]:
  """Groups leaves into scopes.

  Args:
    methods: the rules for all leaves that no override names, one for each
      merge that is made of them.
    overrides: {regex: 'base' or a rule}, the same for all merges.
    paths: the leaves that are merged.
    whole: all leaves, of which an error can say that they are not.

  Returns:
    Pairs of the rules, one a merge, and the leaves over which their totals are
    taken: one leaf if all rules have `scope='tensor'`, else all leaves of these
    rules. Leaves that are kept as the base has them are in none.

  Raises:
    ValueError: if an override matches nothing, or is neither 'base' nor a rule.
  """
  paths = list(paths)
  for value in (overrides or {}).values():
    if not isinstance(value, str) or value != 'base':
      demand_rule("An override is 'base' or a rule", value)
  matched = tree.first_match(
    {regex: i for i, regex in enumerate(overrides or {})},
    paths,
    'overrides',
    whole,
  )
  leaves = collections.defaultdict(list)
  for path in paths:
    leaves[matched.get(path)].append(path)
  result = []
  for i, rule in [*enumerate((overrides or {}).values()), (None, None)]:
    rules = tuple(methods) if i is None else (rule,) * len(methods)
    if rule == 'base' or not leaves[i]:
      continue
    if any(scope_of(rule) == 'model' for rule in rules):
      result.append((rules, leaves[i]))
    else:
      result += [(rules, [path]) for path in leaves[i]]
  return result


def demand_rule(what: str, value: Any) -> None:
  """Raises a ValueError unless the value is a merge rule.

  Args:
    what: how the message begins, such as 'A method is a rule'.
    value: what was given.
  """
  if not callable(value) or isinstance(value, type):
    example = 'mk.ties(density=0.5)'
    raise ValueError(f'{what} such as {example}; {value!r} was given.')
  if inspect.isroutine(value):
    raise ValueError(
      f'{what}; the function {value.__name__} was given. Call it: '
      f'{value.__name__}(...).'
    )
  if jax.tree_util.all_leaves([value]):
    raise ValueError(
      f'{what}, of a class that is decorated with @mergekit_jax.rule; '
      f'{type(value).__name__} is not, which a subclass must be too.'
    )
  name = type(value).__name__
  if checks.takes(value, 2) and not checks.takes(value, 1):
    raise ValueError(
      f'{what}; {name} is a stage, which takes task vectors. Put it into a '
      'chain that makes one of them, such as mk.chain(mk.trim(0.2), '
      'mk.weighted_sum()).'
    )
  checks.one_of(f'{name}.scope', scope_of(value), SCOPES)
  checks.one_of(f'{name}.needs', needs_of(value), NEEDS)
  for path, leaf in jax.tree.leaves_with_path(value):
    if isinstance(leaf, str):
      raise ValueError(
        f'{name}{jax.tree_util.keystr(path)} is {leaf!r}, but '
        'is not declared as text. Declare the field as `str` or `str | None`: '
        'what is neither is a number, which JAX traces.'
      )
