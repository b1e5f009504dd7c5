"""Stages strung together to a rule."""

from __future__ import annotations

import inspect
from typing import Any

import jax

from mergekit_jax import checks
from mergekit_jax.rule import (
  NEEDS,
  needs_of,
  Place,
  rule,
  scope_of,
  SCOPES,
)


def chain(*stages: Any, scope: str | None = None) -> Chain:
  """A merge rule from stages: base + stages(experts − base).

  Args:
    *stages: instances of `@rule` classes, called as `stage(t, deltas)`, which
      return deltas or one delta, and are generators if they ask for totals; the
      last must return one delta.
    scope: 'tensor' or 'model', the set over which their totals are taken; None
      means 'model' if that is the scope of one of the stages, else 'tensor'.

  Returns:
    A rule.

  Raises:
    ValueError: if there is no stage, one is no `@rule`, a whole method or needs
      what nobody knows, or the scope is unknown.
  """
  if not stages:
    raise ValueError('chain() was given no stage; give at least a consensus.')
  for stage in stages:
    if not callable(stage) or jax.tree_util.all_leaves([stage]):
      raise ValueError(
        f'chain() was given {stage!r}; a stage is an instance of a class that '
        'is decorated with @mergekit_jax.rule, such as trim(0.2).'
      )
    if checks.takes(stage, 1) and not checks.takes(stage, 2):
      raise ValueError(
        f'chain() was given {stage!r}, which is a whole method: merge by it '
        'alone. A stage takes task vectors, such as trim(0.2).'
      )
    name = type(stage).__name__
    checks.one_of(f'{name}.needs', needs_of(stage), NEEDS)
    checks.one_of(f'{name}.scope', scope_of(stage), SCOPES)
  if scope is None:
    scope = max(map(scope_of, stages), key=SCOPES.index)
  return Chain(stages, checks.one_of('scope', scope, SCOPES))


@rule
class Chain:
  """See `chain`."""

  stages: tuple
  scope: str

  @property
  def needs(self) -> str:
    """The most that one of the stages needs."""
    return max(map(needs_of, self.stages), key=NEEDS.index)

  def __call__(self, t: Place):
    deltas: Any = [expert - t.base for expert in t.experts]
    for stage in self.stages:
      deltas = stage(t, deltas)
      if inspect.isgenerator(deltas):
        deltas = yield from deltas
    if isinstance(deltas, (list, tuple)):
      raise ValueError(
        f'The stages of a chain end with {len(deltas)} task vectors; end with '
        'a consensus that makes one of them, such as weighted_sum().'
      )
    return t.base + deltas
