"""Which leaves are merged by which rule, and which share their totals."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
import inspect
from typing import Any

import jax

from mergekit_jax import tree
from mergekit_jax.rule import scope_of


def group(
  methods: Sequence[Any],
  overrides: Mapping[str, Any] | None,
  paths: Iterable[str],
) -> list[tuple[tuple[Any, ...], list[str]]]:
  """Groups leaves into scopes.

  Args:
    methods: the rules for all leaves that no override names, one for each
      merge that is made of them.
    overrides: {regex: 'base' or a rule}, the same for all merges.
    paths: the leaves that are merged.

  Returns:
    Pairs of the rules, one a merge, and the leaves over which their totals are
    taken: one leaf if all rules have `scope='tensor'`, else all leaves of these
    rules. Leaves that are kept as the base has them are in none.

  Raises:
    ValueError: if an override matches nothing or is neither.
  """
  paths = list(paths)
  for value in (overrides or {}).values():
    if value != 'base':
      demand_rule("An override is 'base' or a rule", value)
  matched = tree.first_match(
    {regex: i for i, regex in enumerate(overrides or {})}, paths, 'overrides'
  )
  leaves = collections.defaultdict(list)
  for path in paths:
    leaves[matched.get(path)].append(path)
  result = []
  for i, rule in [*enumerate((overrides or {}).values()), (None, None)]:
    rules = tuple(methods) if i is None else (rule,) * len(methods)
    if rule == 'base' or not leaves[i]:
      continue
    together = any(scope_of(rule) == 'model' for rule in rules)
    own = [leaves[i]] if together else [[path] for path in leaves[i]]
    result += [(rules, group) for group in own]
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
  for path, leaf in jax.tree.leaves_with_path(value):
    if isinstance(leaf, str):
      raise ValueError(
        f'{type(value).__name__}{jax.tree_util.keystr(path)} is {leaf!r}, but '
        'is not declared as text. Declare the field as `str` or `str | None`: '
        'what is neither is a number, which JAX traces.'
      )
