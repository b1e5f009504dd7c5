"""Which leaves are merged by which rule, and which share their totals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import inspect
from typing import Any

from mergekit_jax import tree
from mergekit_jax.rule import scope_of


def group(
  method: Any, overrides: Mapping[str, Any] | None, paths: Iterable[str]
) -> list[tuple[Any, list[str]]]:
  """Groups leaves into scopes.

  Args:
    method: the rule for all leaves that no override names.
    overrides: {regex: 'base' or a rule}.
    paths: the leaves that are merged.

  Returns:
    Pairs of a rule and the leaves over which its totals are taken: one leaf
    under `scope='tensor'`, all leaves of the rule under 'model'. Leaves that
    are kept as the base has them are in none.

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
  rules = [*(overrides or {}).values(), method]
  result = []
  for i, rule in enumerate(rules):
    own = [path for path in paths if matched.get(path, len(rules) - 1) == i]
    if rule == 'base' or not own:
      continue
    groups = [own] if scope_of(rule) == 'model' else [[path] for path in own]
    result += [(rule, group) for group in groups]
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
