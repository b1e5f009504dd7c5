"""Cuts what a device holds of a box into slices, each of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Any

import jax

from mergekit_jax.drive import Block
from mergekit_jax.rule import PyTree


def over_slices(
  part: Block,
  number: Any,
  most: int,
  body: Callable[[Sequence[Any], Block, PyTree], PyTree],
  carry: PyTree,
) -> PyTree:
  """Calls `body(start, slice, carry) -> carry` for all slices of a layer.

  Args:
    part: what a device holds of a box.
    number: of the layer, among those of the part.
    most: elements of a slice.
    body: gets where a slice begins in the part, and the slice.
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
      return body(start, _cut(part, start, shape), carry)

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
  """A box of one layer slice of a part, without the stacked axes."""
  rest = [axis for axis in range(len(shape)) if axis not in part.stacked]
  at = [a + b for a, b in zip(part.origin, start, strict=True)]
  layer = part.layer
  for axis in part.stacked:
    layer = layer * part.whole[axis] + at[axis]

  def take(x: jax.Array) -> jax.Array:
    box = jax.lax.dynamic_slice(x, start, shape)
    return jax.lax.squeeze(box, part.stacked)

  base, experts = jax.tree.map(take, (part.base, list(part.experts)))
  return dataclasses.replace(
    part,
    base=base,
    experts=experts,
    origin=[at[axis] for axis in rest],
    whole=tuple(part.whole[axis] for axis in rest),
    stacked=(),
    layer=layer,
  )


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
