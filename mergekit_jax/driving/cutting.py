"""Cuts what a device holds of a box into slices, each of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergekit_jax.driving.block import Block
from mergekit_jax.rule import PyTree

# The most elements that 32 bits can count.
MOST_INDICES = 2**32 - 1


def over_slices(
  part: Block,
  number: Any,
  most: int,
  body: Callable[[Sequence[Any], Sequence[int], Block, PyTree], PyTree],
  carry: PyTree,
) -> PyTree:
  """Calls `carry = body(start, shape, slice, carry)` for a layer's slices.

  Args:
    part: what a device holds of a box.
    number: of the layer, among those of the part.
    most: elements of a slice.
    body: where a slice begins in the part, its shape there, and itself.
    carry: what the first call gets.
  """
  layer = [0] * len(part.shape)
  for axis in reversed(part.stacked):
    layer[axis] = number % part.shape[axis]
    number = number // part.shape[axis]
  for offset, shape, counts in _grids(_layer_shape(part), most):

    def step(number, carry, offset=offset, shape=shape, counts=counts):
      start = [a + b for a, b in zip(layer, offset, strict=True)]
      for axis in reversed(range(len(shape))):
        start[axis] += number % counts[axis] * shape[axis]
        number = number // counts[axis]
      return body(start, shape, _cut(part, start, shape), carry)

    carry = jax.lax.fori_loop(0, math.prod(counts), step, carry)
  return carry


def first_slice(part: Block, most: int) -> Block:
  """One of the slices, which most others are like."""
  _, shape, _ = next(_grids(_layer_shape(part), most))
  return _cut(part, [0] * len(shape), shape)


def _layer_shape(part: Block) -> list[int]:
  """The shape of one layer slice, whose stacked axes are kept."""
  return [1 if i in part.stacked else n for i, n in enumerate(part.shape)]


def _cut(part: Block, start: Sequence[Any], shape: Sequence[int]) -> Block:
  """A box of one layer slice of a part, without the stacked axes.

  Where its elements follow each other in the layer, only its last axis is
  longer than 1, so that slices of many tensors are alike, and a rule is traced
  for all of them once.
  """
  rest = [axis for axis in range(len(shape)) if axis not in part.stacked]
  at = [a + b for a, b in zip(part.origin, start, strict=True)]
  layer = jnp.asarray(part.layer, jnp.int32)
  for axis in part.stacked:
    layer = layer * part.whole[axis] + at[axis]

  whole = tuple(part.whole[axis] for axis in rest)
  origin = [at[axis] for axis in rest]
  extents = tuple(shape[axis] for axis in rest)
  if rest and is_run(extents, whole) and math.prod(whole) <= MOST_INDICES:
    index = jnp.uint32(0)
    for first, size in zip(origin, whole, strict=True):
      index = index * np.uint32(size) + jnp.asarray(first).astype(jnp.uint32)
    ones = (1,) * (len(rest) - 1)
    origin = [*(0 for _ in ones), index]
    whole, extents = (*ones, MOST_INDICES), (*ones, math.prod(extents))

  def take(x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(x, start, shape).reshape(extents)

  base, experts = jax.tree.map(take, (part.base, list(part.experts)))
  return dataclasses.replace(
    part,
    base=base,
    experts=experts,
    origin=origin,
    whole=whole,
    stacked=(),
    layer=layer,
  )


def is_run(shape: Sequence[int], whole: Sequence[int]) -> bool:
  """Whether a box is one run of a row-major array."""
  first = next((i for i, n in enumerate(shape) if n > 1), len(shape))
  return tuple(shape[first + 1 :]) == tuple(whole[first + 1 :])


def _grids(
  whole: Sequence[int], most: int
) -> Iterator[tuple[list[int], list[int], list[int]]]:
  """Slices that tile a shape: where they begin, their shape, how many."""
  shape = list(whole)
  for axis, size in enumerate(whole):
    if math.prod(shape) > most:
      rows = max(1, most // math.prod(shape[axis + 1 :]))
      # A few more may leave no rest, for which to compile the rule again.
      few = -(-size // rows)
      even = (size // n for n in range(few, 2 * few) if size % n == 0)
      shape[axis] = next(even, rows)
  counts = [n // size for n, size in zip(whole, shape, strict=True)]
  yield [0] * len(shape), shape, counts
  for axis, size in enumerate(whole):
    if rest := size % shape[axis]:
      offset = [0] * len(shape)
      offset[axis] = size - rest
      left = [*shape[:axis], rest, *shape[axis + 1 :]]
      yield offset, left, [*counts[:axis], 1, *counts[axis + 1 :]]
