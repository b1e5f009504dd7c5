"""How a rule is driven: one block of one tensor at a time.

Every driver, in memory or streamed (`slices.py`), does the same:

    answers = []
    while True:
      steps = [advance(rule, block, answers) for block in scope]
      if steps[0].merged is not None: break
      answers.append(answer(rule, sum of the steps' partials, answers))

`advance` and `answer` are compiled once per shape. A rule is replayed from its
beginning in every round: the replay costs tracing time, once, and leaves no
state to keep between blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mergekit_jax.driving.block import Block, stand_in_shape
from mergekit_jax.driving.refused import (
  demand_flags,
  demand_values,
  explained,
)
from mergekit_jax.driving.widths import (
  movable,
  narrow,
  narrow_number,
  narrow_spec,
  wide_add,
  widen,
)
from mergekit_jax.kernels import random
from mergekit_jax.rule import needs_of, Place, PyTree, scope_of, Step, step


class NoKeyError(ValueError):
  """A rule draws random numbers and was given no key."""


class Advance(NamedTuple):
  """What one block gave: partial sums for an open round, or its merge.

  Attributes:
    partials: the partials of the open totals; under `scope='tensor'` with the
      stacked axes in front. None when the rule has finished.
    merged: `[*shape]` in the block's dtype, or None.
  """

  partials: list[PyTree] | None
  merged: jax.Array | None


@jax.jit
def advance(method: Any, block: Block, answers: Sequence[PyTree]) -> Advance:
  """Drives a rule over one block as far as the answers reach.

  Args:
    method: a rule.
    block: the block.
    answers: all answers so far, from `answer`.

  Returns:
    The partials of the next round or, when the answers suffice, the merge.
  """
  partials, merged, _ = on_layers(method, block, answers)
  if scope_of(method) == 'model':
    partials = _sum_over_layers(partials, len(block.stacked))
  return Advance(partials, merged)


@functools.partial(jax.jit, static_argnames=('report',))
def on_layers(
  method: Any,
  block: Block,
  answers: Sequence[PyTree],
  report: bool = False,
) -> Any:
  """`advance`, with the stacked axes in front of all partials.

  Args:
    method: a rule.
    block: the block.
    answers: all answers so far.
    report: whether to give the flags for the report.

  Returns:
    Partials, merge and flags: what the rule reported, bool arrays `[*shape]`.

  Raises:
    TypeError: if the rule returns no array of floating-point numbers, or
      reports what is no bool `[*shape]`.
    ValueError: if what it returns has another shape and is no scalar.
  """
  block = block.floats()
  of_tensor = scope_of(method) == 'tensor'
  to_float32 = lambda x: None if x is None else x.astype(jnp.float32)

  def on_slice(base, experts, layer, answers):
    experts = [to_float32(expert) for expert in experts]
    place = _place(block, to_float32(base), experts, layer)
    with explained(method):
      reached = step(method(place), answers)
    if reached.request is None:
      demand_values(method, reached.returned, place.experts[0].shape)
      merged = jnp.broadcast_to(reached.returned, place.experts[0].shape)
      flags = reached.flags if report else {}
      demand_flags(method, flags, merged.shape)
      with jax.enable_x64(block.dtype == jnp.float64):
        return None, merged.astype(block.dtype), flags
    return [total.partial for total in reached.totals], None, {}

  # Outermost first: an axis shifts down by the stacked axes already taken off.
  axes = [axis - i for i, axis in enumerate(block.stacked)]
  for axis in reversed(axes):
    on_slice = jax.vmap(
      on_slice, (axis, axis, 0, 0 if of_tensor else None), (0, axis, axis)
    )
  return on_slice(
    block.base,
    list(block.experts),
    _layers(block),
    jax.tree.map(narrow, list(answers)),
  )


@functools.partial(
  jax.jit, static_argnames=('shape', 'layered', 'experts', 'has_base')
)
def _answer(method, totals, answers, shape, layered, experts, has_base):
  def of_slice(totals, answers):
    leaves, structure = jax.tree.flatten((method, totals, answers))
    specs = tuple(map(jax.typeof, leaves))
    if not _is_for_any_size(structure, specs, shape, experts, has_base):
      raise _sees_too_much(method)
    question = _open_question(method, answers, shape, experts, has_base)
    return question.answered(_answers(question, totals, answers))

  for _ in range(layered):
    of_slice = jax.vmap(of_slice)
  return of_slice(totals, list(answers))


@functools.cache
def _is_for_any_size(structure, specs, shape, experts, has_base) -> bool:
  """Whether each `then` is the same program for blocks of any size."""

  def answers_of(shape, method, totals, answers):
    question = _open_question(method, answers, shape, experts, has_base)
    return _answers(question, totals, answers)

  # A rule's numbers must not widen what they meet.
  given = structure.unflatten(
    jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in specs
  )
  # Twice the size, for what only takes a multiple of something.
  method, *_ = given
  if scope_of(method) == 'model':
    # Of one total are tensors whose rows are longer, too.
    twice = tuple(2 * n for n in shape)
  else:
    twice = stand_in_shape(needs_of(method), shape, size=4)
  programs = (
    jax.make_jaxpr(functools.partial(answers_of, each))(*given)
    for each in (shape, twice)
  )
  return len({f'{program} {program.consts}' for program in programs}) == 1


def _answers(
  question: Step, totals: Sequence[PyTree], answers: Sequence[PyTree]
) -> list[PyTree]:
  return [
    reached.then(total, list(answers))
    for total, reached in zip(totals, question.totals, strict=True)
  ]


def answer(
  method: Any, block: Block, totals: list[PyTree], answers: Sequence[PyTree]
) -> PyTree:
  """Answers the open round of a rule.

  Args:
    method: the rule.
    block: any block of the scope, for its rank and number of experts.
    totals: the added partials, int64 and float64; under `scope='tensor'` with
      the stacked axes in front.
    answers: the earlier answers.

  Returns:
    The answers with 64-bit types, in the shape of the rule's request.

  Raises:
    TypeError: if a `then` uses something computed from the models, or the size
      of an array.
  """
  stacked = len(block.stacked)
  with jax.enable_x64(True), explained(method):
    try:
      return _answer(
        jax.tree.map(narrow_number, method),
        totals,
        answers,
        shape=stand_in_shape(needs_of(method), block.whole, block.stacked),
        layered=stacked if scope_of(method) == 'tensor' else 0,
        experts=len(block.experts),
        has_base=block.base is not None,
      )
    except jax.errors.UnexpectedTracerError as error:
      raise _sees_too_much(method) from error


def _sees_too_much(method: Any) -> TypeError:
  return TypeError(
    f'{type(method).__name__}: a `then` uses a value computed from the base or '
    'the experts, or the size of an array. It may use its total, its earlier '
    "answers and the rule's own numbers; put what else it needs into the "
    'partial, as mergekit_jax.count(jnp.ones_like(x, bool)) for a size.'
  )


def _open_question(method, answers, shape, experts, has_base) -> Step:
  """Replays a rule on a stand-in tensor to reach its open totals.

  The rule runs in a trace of its own, so that a `then` which uses anything
  computed from the models fails in memory as it must when streamed. A `then`
  must not depend on the size of a block either, so it must be the same for
  stand-ins of any `shape`.
  """
  values = jax.ShapeDtypeStruct(shape, jnp.float32)
  reached = []

  def trace(base, experts, layer, answers):
    bits = lambda i: jnp.zeros(values.shape, jnp.uint32)
    open_step = step(method(Place(base, experts, layer, bits)), answers)
    reached.append(open_step.without_partials())
    return [total.partial for total in open_step.totals]

  with jax.enable_x64(False):
    jax.eval_shape(
      trace,
      values if has_base else None,
      [values] * experts,
      jax.ShapeDtypeStruct((), jnp.int32),
      jax.tree.map(narrow_spec, list(answers)),
    )
  return reached[0]


def run(method: Any, blocks: Sequence[Block]) -> list[jax.Array]:
  """Merges whole tensors that share one scope, all of them in memory.

  Args:
    method: a rule.
    blocks: the tensors; exactly one under `scope='tensor'`.

  Returns:
    The merged tensors, in order.

  Raises:
    ValueError: if the rule asks for totals on some of them only.
  """
  answers = []
  while True:
    merged, totals = [], []
    for block in blocks:
      reached = advance(method, block, answers)
      merged.append(reached.merged)
      if reached.partials is not None:
        # At once: those of all blocks may be larger than the models.
        totals = [wide_add([*totals, movable(reached.partials)])]
    if not totals:
      return merged
    if any(leaf is not None for leaf in merged):
      raise unlike_rounds(method)
    answers.append(movable(answer(method, blocks[0], totals[0], answers)))


def unlike_rounds(method: Any) -> ValueError:
  name = type(method).__name__
  return ValueError(
    f'{name} asks for totals on some leaves and not on others, which are one '
    "scope: scope='model' is its own, or that of a rule it is merged beside. "
    'Ask on all of them: what does not count may add 0.'
  )


def _sum_over_layers(tree: PyTree, stacked: int) -> PyTree:
  with jax.enable_x64(True):
    axes = tuple(range(stacked))
    return jax.tree.map(lambda x: jnp.sum(widen(x), axis=axes), tree)


def _layers(block: Block) -> jax.Array | int:
  """The number of each layer slice, int32 `[*stacked sizes]`, row-major."""
  layers = jnp.asarray(block.layer, jnp.int32)
  for axis in block.stacked:
    position = block.origin[axis] + jnp.arange(block.shape[axis])
    layers = layers[..., None] * block.whole[axis] + position.astype(jnp.int32)
  return layers


def _place(block, base, experts, layer) -> Place:
  """The place of a rule on one layer slice of a block."""
  kept = [i for i in range(len(block.whole)) if i not in block.stacked]

  @functools.cache
  def bits():
    if block.key is None:
      raise NoKeyError(
        'This method draws random numbers, but no key was given. Pass '
        '`key=jax.random.key(seed)` to `merge`.'
      )
    index = random.element_index(
      [block.shape[i] for i in kept],
      [block.origin[i] for i in kept],
      [block.whole[i] for i in kept],
    )
    return random.expert_bits(block.key, layer, index)

  return Place(base, experts, layer, lambda expert: bits()(expert))
