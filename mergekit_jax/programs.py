"""What is compiled to merge a box, and is compiled before the box is read.

A plan has few shapes of boxes. While the first ones are read and merged, the
programs of the next ones are traced, and compiled or loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mergekit_jax import drive, slices
from mergekit_jax.block import bits_dtype, Block
from mergekit_jax.measure import measure_on
from mergekit_jax.plan import Plan, Tensor, Unit
from mergekit_jax.views import View, view


class Programs(NamedTuple):
  """What merges a box by one rule: compiled, for arrays of one kind.

  Attributes:
    partials: of each round; called with the rule, the box and the answers, as
      `slices.partials` is.
    merge: called in the same way, as `slices.merge` is.
    measure: called with the box, its merge and the flags: `measure_on`.
  """

  partials: list[Callable[..., Any]]
  merge: Callable[..., Any]
  measure: Callable[..., Any]


class Ahead:
  """Compiles the programs of a plan in the order in which it needs them.

  They are called as they are, not by way of `jax.jit`: what that finds again
  depends on the contexts of a thread, such as a mesh that the caller has set.
  """

  def __init__(
    self, plan: Plan, has_base: bool, report: bool, done: Container[int]
  ):
    """Starts to compile, in threads of its own.

    Args:
      plan: the plan.
      has_base: whether the first source of each leaf is the base.
      report: whether the merges report.
      done: numbers of units that are not merged again.
    """
    self._plan = plan
    self._pool = concurrent.futures.ThreadPoolExecutor(2)
    self._compiled: dict[Any, concurrent.futures.Future] = {}
    for unit in plan.units(done):
      for key, *what in self._needed(unit):
        if key not in self._compiled:
          self._compiled[key] = self._pool.submit(
            _compile,
            *(*what, unit.tensor, plan.mesh, has_base, report),
          )

  def __enter__(self) -> Ahead:
    return self

  def __exit__(self, *error: Any) -> None:
    self._pool.shutdown(cancel_futures=True)

  def programs(self, unit: Unit) -> list[Programs]:
    """Waits for what a unit needs, for each of its rules."""
    return [self._compiled[key].result() for key, *_ in self._needed(unit)]

  def _needed(self, unit: Unit) -> Iterator[tuple[Any, Any, int, View]]:
    """What the programs of a unit depend on; its rules, rounds and view."""
    scope = self._plan.scopes[unit.scope]
    tensor, box = unit.tensor, unit.box
    seen = view(scope.rules, tensor, box, self._plan.mesh)
    shapes = seen._replace(origin=())
    dtypes = (tensor.sources, tensor.dtype)
    for rule, rounds in zip(scope.rules, scope.rounds, strict=True):
      numbers = tuple(map(jax.typeof, jax.tree.leaves(rule)))
      key = (jax.tree.structure(rule), numbers, shapes, dtypes)
      yield key, rule, rounds, seen


def _compile(*what: Any) -> Programs:
  *partials, merge, measure = [lowered.compile() for _, lowered in steps(*what)]
  return Programs(partials, merge, measure)


def steps(
  rule: Any,
  rounds: int,
  seen: View,
  tensor: Tensor,
  mesh: Mesh,
  has_base: bool,
  report: bool = True,
) -> Iterator[tuple[str, Any]]:
  """What the stream compiles to merge a box: names, and lowered functions."""
  placed = NamedSharding(mesh, seen.spec)
  spread = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
  arrays = [
    jax.ShapeDtypeStruct(seen.shape, bits_dtype(dtype), sharding=placed)
    for dtype in tensor.sources
  ]
  block = Block(
    base=arrays[0] if has_base else None,
    experts=arrays[has_base:],
    key=jax.ShapeDtypeStruct((2,), jnp.uint32),
    origin=seen.origin,
    whole=seen.whole,
    stacked=seen.stacked,
    dtype=tensor.dtype,
    sources=tensor.sources,
  )
  answers = []
  for number in range(rounds):
    lowered = slices.partials.lower(placed, rule, block, answers)
    yield f'round {number + 1}', lowered
    with jax.enable_x64(True):
      totals = jax.eval_shape(drive.wide_add, [_specs(lowered)])
      answer = jax.eval_shape(
        functools.partial(drive.answer, rule, block), totals, answers
      )
      # Arrays, for a shape of 64-bit type alone would be narrowed.
      answers.append(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), answer)
      )
  lowered = slices.merge.lower(placed, rule, block, answers, report)
  yield 'merge', lowered
  merged, flags = jax.tree.map(spread, _specs(lowered))
  yield 'measure', measure_on(placed).lower(placed, block, merged, flags)


def _specs(lowered: Any) -> Any:
  """What a lowered function returns."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info
  )
