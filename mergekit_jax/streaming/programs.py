"""What is compiled to merge a box, and is compiled before the box is read.

A plan has few shapes of boxes. While the first ones are read and merged, the
programs of the next ones are traced, and compiled or loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
import concurrent.futures
import contextlib
import functools
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from mergekit_jax.driving import drive, slices
from mergekit_jax.driving.block import bits_dtype, Block
from mergekit_jax.driving.measure import measure_on
from mergekit_jax.driving.widths import narrow, wide_add
from mergekit_jax.planning.plan import Plan, Tensor, Unit
from mergekit_jax.rule import PyTree
from mergekit_jax.streaming.views import block_of, View, view


class Round:
  """What finds the partials of a round, called as `slices.partials` is."""

  def __init__(self, compiled: jax.stages.Compiled):
    self._compiled = compiled
    (self._of_rule, of_block, self._of_answers), _ = compiled.input_shardings
    self._of_key = of_block.key

  def __call__(
    self, rule: Any, block: Block, answers: Sequence[PyTree]
  ) -> list[PyTree]:
    return self._compiled(rule, block, answers)

  def question(
    self, rule: Any, block: Block, answers: Sequence[PyTree]
  ) -> tuple[bytes, ...]:
    """On what the partials of a box hang, but for the models.

    Rules that put the same question, such as TIES with another scale, get the
    same partials. A program takes no arguments that it does not use: these have
    no sharding.
    """
    given = (rule, block.key, answers)
    shardings = jax.tree.structure(given).flatten_up_to(
      (self._of_rule, self._of_key, self._of_answers)
    )
    return tuple(
      np.asarray(x).tobytes()
      for x, sharding in zip(jax.tree.leaves(given), shardings, strict=True)
      if sharding is not None
    )


class Programs(NamedTuple):
  """What merges a box by one rule: compiled, for arrays of one kind.

  Attributes:
    partials: of each round.
    merge: called in the same way, as `slices.merge` is.
    measure: called with the box, its merge and the flags: `measure_on`.
  """

  partials: list[Round]
  merge: Callable[..., Any]
  measure: Callable[..., Any]


@contextlib.contextmanager
def ahead(
  plan: Plan, report: bool, done: Container[int]
) -> Iterator[Callable[[Unit], list[Programs]]]:
  """Compiles the programs of a plan in the order in which it needs them.

  They are called as they are, not by way of `jax.jit`: what that finds again
  depends on the contexts of a thread, such as a mesh that the caller has set.

  Args:
    plan: the plan.
    report: whether the merges report.
    done: numbers of units that are not merged again.

  Yields:
    A function that waits for the programs of a unit, one of each rule.
  """
  has_64_bits = _has_64_bits()
  stopped = threading.Event()

  def compiled(rule: Any, rounds: int, seen: View, tensor: Tensor) -> Programs:
    programs = []
    # As in the thread that calls them.
    with jax.enable_x64(has_64_bits), jax.disable_jit(False):
      for _, lowered in steps(plan, rule, rounds, seen, tensor, report):
        programs.append(lowered.compile())
        if stopped.is_set():
          raise concurrent.futures.CancelledError
    *partials, merge, measure = programs
    return Programs([*map(Round, partials)], merge, measure)

  # A GPU times kernels to choose among them, which two at once would disturb
  # (github.com/openxla/xla/issues/41399).
  on_gpu = plan.mesh.devices.flat[0].platform == 'gpu'
  pool = concurrent.futures.ThreadPoolExecutor(1 if on_gpu else 2)
  compiling: dict[Any, concurrent.futures.Future] = {}
  of_boxes: dict[Any, list[concurrent.futures.Future]] = {}

  def of_unit(unit: Unit) -> list[concurrent.futures.Future]:
    scope, tensor, box = plan.scopes[unit.scope], unit.tensor, unit.box
    stored = (tensor.shape, tensor.stacked, tensor.sources, tensor.dtype)
    # A look at the rules takes longer than it may for each of 100,000 boxes.
    like = (*map(id, scope.rules), stored, box.shape, box.spec)
    if like not in of_boxes:
      seen = view(scope.rules, tensor, box, plan.mesh)
      futures = of_boxes[like] = []
      for rule, rounds in zip(scope.rules, scope.rounds, strict=True):
        numbers = tuple(map(jax.typeof, jax.tree.leaves(rule)))
        key = (jax.tree.structure(rule), numbers, rounds, stored[2:])
        key += (seen._replace(origin=()),)
        if key not in compiling:
          compiling[key] = pool.submit(compiled, rule, rounds, seen, tensor)
        futures.append(compiling[key])
    return of_boxes[like]

  try:
    for unit in plan.units(done):
      of_unit(unit)
    yield lambda unit: [future.result() for future in of_unit(unit)]
  finally:
    stopped.set()
    pool.shutdown(cancel_futures=True)


def steps(
  plan: Plan,
  rule: Any,
  rounds: int,
  seen: View,
  tensor: Tensor,
  report: bool = True,
) -> Iterator[tuple[str, Any]]:
  """What the stream compiles to merge a box: names, and lowered functions."""
  placed = NamedSharding(plan.mesh, seen.spec)
  spread = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
  held = [jax.dtypes.canonicalize_dtype(bits_dtype(d)) for d in tensor.sources]
  arrays = [
    jax.ShapeDtypeStruct(seen.shape, dtype, sharding=placed) for dtype in held
  ]
  key = jax.ShapeDtypeStruct((2,), jnp.uint32)
  block = block_of(tensor, seen, arrays, plan.has_base, key)
  answers, known = [], []
  for number in range(rounds):
    lowered = slices.partials.lower(placed, rule, block, known)
    yield f'round {number + 1}', lowered
    with jax.enable_x64(True):
      totals = jax.eval_shape(wide_add, [_specs(lowered)])
      answer = jax.eval_shape(
        functools.partial(drive.answer, rule, block), totals, answers
      )
      # Arrays, for a shape of 64-bit type alone would be narrowed.
      zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), answer)
      answers.append(zeros)
      known.append(jax.tree.map(narrow, zeros))
  lowered = slices.merge.lower(placed, rule, block, known, report)
  yield 'merge', lowered
  # A merge may have 64 bits where its sources were narrowed.
  with jax.enable_x64(_has_64_bits() or tensor.dtype.itemsize == 8):
    merged, flags = jax.tree.map(spread, _specs(lowered))
    lowered = measure_on(placed).lower(placed, block, merged, flags)
  yield 'measure', lowered


def _has_64_bits() -> bool:
  """Whether arrays of this thread may have 64-bit types."""
  return jax.dtypes.canonicalize_dtype(np.int64) == np.int64


def _specs(lowered: Any) -> Any:
  """What a lowered function returns."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info
  )
