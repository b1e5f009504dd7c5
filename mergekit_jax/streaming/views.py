"""How kernels see a box: in a row, where its elements follow each other.

Boxes of many shapes are then alike, and the same programs merge them all. A row
has the rank of the tensor, which a rule may look at.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from jax.sharding import Mesh, PartitionSpec
import numpy as np

from mergekit_jax.driving.block import Block
from mergekit_jax.driving.cutting import is_run, MOST_INDICES
from mergekit_jax.planning.plan import Box, Tensor
from mergekit_jax.rule import needs_of
from mergekit_jax.sharding import padded, shards

# Where a device's part of a row begins a slice is counted in int32.
_INT32_LIMIT = 2**31


class View(NamedTuple):
  """What a `Block` of a box has to say of its place.

  Attributes:
    shape: of its arrays.
    spec: how these are spread over the mesh.
    origin: where it begins, one integer scalar a dimension.
    whole: shape of what it is cut from; a row, of one that is long enough.
    stacked: the axes over which layers are stacked.
  """

  shape: tuple[int, ...]
  spec: PartitionSpec
  origin: tuple[np.integer, ...]
  whole: tuple[int, ...]
  stacked: tuple[int, ...]


def view(rules: Sequence[object], tensor: Tensor, box: Box, mesh: Mesh) -> View:
  """The view that kernels have of a box.

  The stacked axes stay in front, and the elements of a layer slice lie along
  the last axis, if the rules look at single elements, each device has a run of
  them, and 32 bits can number them.

  Args:
    rules: all that see the box.
    tensor: that the box is cut from.
    box: the box.
    mesh: over which it is spread.
  """
  layers = len(tensor.stacked)
  kept, whole = box.shape[layers:], tensor.shape[layers:]
  spec = padded(box.spec, len(box.shape))
  counts = shards(box.spec, len(box.shape), mesh)
  spread = [axis for axis in range(layers, len(spec)) if counts[axis] > 1]
  first = next((i for i, size in enumerate(kept) if size > 1), 0)
  if (
    not kept
    or tensor.stacked != tuple(range(layers))
    or any(needs_of(rule) != 'element' for rule in rules)
    or math.prod(whole) > MOST_INDICES
    or not is_run(kept, whole)
    or spread not in ([], [layers + first])
    or math.prod(kept) // math.prod(counts[layers:]) >= _INT32_LIMIT
  ):
    origin = tuple(np.int32(start) for start in box.origin)
    return View(box.shape, box.spec, origin, tensor.shape, tensor.stacked)
  start = 0
  for position, size in zip(box.origin[layers:], whole, strict=True):
    start = start * size + position
  ones = (1,) * (len(kept) - 1)
  return View(
    (*box.shape[:layers], *ones, math.prod(kept)),
    PartitionSpec(*spec[:layers], *(None for _ in ones), spec[layers + first]),
    (
      *(np.int32(start) for start in box.origin[:layers]),
      *(np.int32(0) for _ in ones),
      np.uint32(start),
    ),
    (*tensor.shape[:layers], *ones, MOST_INDICES),
    tensor.stacked,
  )


def block_of(
  tensor: Tensor,
  seen: View,
  arrays: Sequence[Any],
  has_base: bool,
  key: Any,
) -> Block:
  """A box as kernels see it.

  Args:
    tensor: that the box is cut from.
    seen: the view of the box.
    arrays: the bits of every model, the base first if there is one.
    has_base: whether there is one.
    key: the random key of the tensor, uint32 `[2]`.
  """
  return Block(
    base=arrays[0] if has_base else None,
    experts=list(arrays[has_base:]),
    key=key,
    origin=seen.origin,
    whole=seen.whole,
    stacked=seen.stacked,
    dtype=tensor.dtype,
    sources=tensor.sources,
    layer=np.int32(0),
  )
