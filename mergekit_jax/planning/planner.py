"""Makes a plan: cuts every leaf into the largest boxes that fit the budget."""

from __future__ import annotations

import bisect
from collections.abc import Container, Mapping, Sequence
import itertools
import math
import operator
from typing import Any

from jax.sharding import Mesh, PartitionSpec
import numpy as np

from mergekit_jax import sharding
from mergekit_jax.planning.costs import Costs, Leaf
from mergekit_jax.planning.plan import Box, Plan, Scope, Tensor
from mergekit_jax.rule import scope_of

# Bytes of one model on one device.
_SMALLEST_PART = 64 * 2**10
# Bytes of a box in all models on one host, 8 MiB in each of nine, unless a
# layer is larger and read once. So the memory of a merge does not grow with the
# number of its experts.
_LARGEST_UNIT = 72 * 2**20
# The same where boxes that are smaller than what is decoded at once decode it
# again; larger ones, within the budget, only where these do.
_LARGEST_COMPRESSED_UNIT = 160 * 2**20
# By how much more may be decoded for the sake of smaller boxes.
_LITTLE_MORE = 1.1
# Bytes of the partial sums of a box, unless one layer has more, or what is
# decoded at once holds many layers.
_MOST_PARTIALS = 8 * 2**20
# Bytes of one model on one host that are worth a read of their own.
_SMALLEST_COLUMN = 4 * 2**20

# The boxes of a tensor, whether they hold whole layers, and how often what they
# hold is decoded.
_Tiling = tuple[tuple[Box, ...], bool, float]


def make_plan(
  scopes: Sequence[tuple[tuple[Any, ...], Sequence[Leaf]]],
  mesh: Mesh,
  *,
  memory_budget: int,
  has_base: bool,
  partition_rules: Mapping[str, PartitionSpec] | None = None,
  decoding_bytes: int = 0,
  merges: int = 1,
  hosts: int | None = None,
) -> Plan:
  """Cuts every leaf into boxes that fit the memory budget.

  Args:
    scopes: leaves, and the rules that merge them: one for each merge that is
      made of them, none to copy.
    mesh: a mesh with Auto axes.
    memory_budget: bytes of host memory.
    has_base: whether the first source of each leaf is the base.
    partition_rules: partition specs by regular expression of a path.
    decoding_bytes: host memory that the sources take beside the buffers.
    merges: how many merges are made from one read.
    hosts: over how many hosts the devices of the mesh are spread; as they say
      themselves if None.

  Returns:
    The plan.

  Raises:
    ValueError: if the smallest possible unit does not fit the budget, a
      partition rule matches nothing or does not fit, or a rule needs a base or
      asks for totals on some leaves of a scope only.
  """
  shapes = {leaf.path: leaf.shape for _, leaves in scopes for leaf in leaves}
  given = sharding.partitions(partition_rules, shapes, mesh)
  costs = Costs(
    mesh,
    memory_budget,
    has_base=has_base,
    decoding_bytes=decoding_bytes,
    merges=merges,
    hosts=hosts,
  )
  # Of leaves that are alike, the first stands for its cost.
  cuts: dict[Any, tuple[Leaf, _Tiling, int]] = {}

  def cut(rules: tuple[Any, ...], leaf: Leaf) -> Tensor:
    spec = given.get(leaf.path)
    key = (*map(id, rules), leaf.layout, spec)
    if key not in cuts:
      cuts[key] = leaf, *_cut(rules, leaf, spec, costs)
    _, tiling, _ = cuts[key]
    return Tensor(
      leaf.path, leaf.shape, leaf.sources, leaf.dtype, leaf.stacked, *tiling
    )

  planned = []
  for rules, leaves in scopes:
    rounds = tuple(costs.rounds(rule, leaves) for rule in rules)
    planned.append(
      Scope(rules, rounds, tuple(cut(rules, leaf) for leaf in leaves))
    )
  largest, _, most = max(
    cuts.values(), key=operator.itemgetter(2), default=(None, None, 0)
  )
  if largest and most > memory_budget:
    raise ValueError(
      f'memory_budget={memory_budget:,} bytes is too small: the smallest unit '
      f'of {largest.path} {largest.shape} takes {most:,} bytes. Give at least '
      f'that ({-(-most // 2**20)}MiB).'
    )
  return Plan(tuple(planned), merges, mesh, has_base, most, memory_budget)


def _cut(
  rules: Sequence[Any],
  leaf: Leaf,
  spec: PartitionSpec | None,
  costs: Costs,
) -> tuple[_Tiling, int]:
  """Cuts one leaf into boxes; gives the host memory that one takes, too."""
  if spec is None:
    # What is not spread, every host reads: on many, smaller parts are worth it.
    smallest = _SMALLEST_PART // leaf.itemsize // costs.hosts
    spec = sharding.partition(leaf.shape, costs.mesh, leaf.stacked, smallest)
  spec = _undivided(spec, leaf, rules, costs)
  shards = costs.shards(spec, len(leaf.shape))
  extents, amplification = _extents(rules, leaf, shards, costs)
  along = [*map(_segments, leaf.shape, extents, shards)]
  origins, shapes, sharded = (
    itertools.product(*[segments[i] for segments in along]) for i in range(3)
  )
  boxes = [
    Box(origin, shape, costs.spread_along(spec, kept))
    for origin, shape, kept in zip(origins, shapes, sharded, strict=True)
  ]
  if leaf.chunk:
    # The boxes of what is decoded at once follow each other.
    chunk = [max(1, size) for size in leaf.chunk]
    boxes.sort(key=lambda box: [*map(operator.floordiv, box.origin, chunk)])
  whole_layers = all(
    len(starts) == 1
    for axis, (starts, _, _) in enumerate(along)
    if axis not in leaf.stacked
  )
  most = costs.of(rules, leaf, extents, math.prod(shards))
  return (tuple(boxes), whole_layers, amplification), most


def _cuttable(leaf: Leaf, needs: Container[str]) -> list[int]:
  """The axes, stacked ones apart, along which a leaf may be cut."""
  unstacked = [i for i in range(len(leaf.shape)) if i not in leaf.stacked]
  if 'matrix' in needs:
    return []
  return unstacked[:-1] if 'row' in needs else unstacked


def _undivided(
  spec: PartitionSpec, leaf: Leaf, rules: Sequence[Any], costs: Costs
) -> PartitionSpec:
  """The spec without axes whose remainder would cut what must stay whole."""
  free = {*_cuttable(leaf, costs.needs(rules)), *leaf.stacked}
  counts = costs.shards(spec, len(leaf.shape))
  kept = [
    axis in free or size % counts[axis] == 0
    for axis, size in enumerate(leaf.shape)
  ]
  return costs.spread_along(spec, tuple(kept))


def _extents(
  rules: Sequence[Any], leaf: Leaf, shards: Sequence[int], costs: Costs
) -> tuple[list[int], float]:
  """The shape of the boxes of a leaf, and how often what they hold is decoded.

  A rule whose totals are about a layer reads once what holds whole layers. If
  these lie in many compressed pieces, more reads may decode less, and so may
  boxes that are larger than others: the smallest that decode little are taken.
  """
  rounds = [costs.asked(rule, leaf)[0] for rule in rules]
  asking = [rule for rule, n in zip(rules, rounds, strict=True) if n]
  saves_reads = bool(asking) and all(
    scope_of(rule) == 'tensor' for rule in asking
  )
  if not leaf.chunk:
    return _largest(rules, leaf, shards, costs, saves_reads, _LARGEST_UNIT), 1.0
  apart = any(scope_of(rule) == 'tensor' for rule in asking)
  reads = 1 + max(rounds, default=0)
  options = []
  for largest in (_LARGEST_COMPRESSED_UNIT, costs.budget):
    for whole in (True, False) if saves_reads else (False,):
      extents = _largest(rules, leaf, shards, costs, whole, largest)
      times = _amplification(leaf, extents, apart)
      options.append((times * (1 if whole else reads), extents, times))
  least, *_ = min(options)
  return next(
    (extents, times)
    for decoded, extents, times in options
    if decoded <= least * _LITTLE_MORE
  )


def _largest(
  rules: Sequence[Any],
  leaf: Leaf,
  shards: Sequence[int],
  costs: Costs,
  saves_reads: bool,
  largest: int,
) -> list[int]:
  """The shape of the largest boxes of a leaf that fit the budget.

  They have `largest` bytes in all models on one host, or a layer more.
  Boxes are as wide as what lies in one piece, if that is narrower than the
  leaf. Stacked axes are cut first, since layers do not need each other, then
  the leading axes, so that a box stays a run of bytes.
  """
  unstacked = [i for i in range(len(leaf.shape)) if i not in leaf.stacked]
  cuttable = _cuttable(leaf, costs.needs(rules))
  extents = list(leaf.shape)
  spread = math.prod(shards)
  if not saves_reads:
    # Across stored columns a box would be read in short runs.
    for axis in cuttable[1:]:
      column = leaf.stored[axis] * shards[axis] if leaf.stored else 0
      size = leaf.shape[axis]
      narrower = [*extents[:axis], column, *extents[axis + 1 :]]
      held = costs.held(narrower, spread) * leaf.itemsize
      if 0 < column < size and not size % column and held >= _SMALLEST_COLUMN:
        extents = narrower
  # Half of what is worth a device, if the budget asks for it. A part that every
  # device holds may be smaller: each of them computes it.
  smallest = _SMALLEST_PART // 2 // leaf.itemsize * spread
  smallest //= costs.replicas(spread)
  most_elements = costs.spread(largest // leaf.itemsizes, spread)

  def fits(axis: int, extent: int) -> bool:
    shape = [*extents[:axis], extent, *extents[axis + 1 :]]
    if math.prod(shape) > most_elements and not (
      saves_reads
      and axis not in leaf.stacked
      and all(shape[i] == leaf.shape[i] for i in unstacked)
    ):
      return False
    if axis in leaf.stacked and not leaf.chunk:
      if costs.partial_bytes(rules, leaf, shape) > _MOST_PARTIALS:
        return False
    return costs.of(rules, leaf, shape, spread) <= costs.budget

  for axis in (*leaf.stacked, *cuttable):
    if fits(axis, extents[axis]):
      if axis in leaf.stacked:
        continue
      break  # as it is now, whichever axis is asked for
    count = shards[axis]
    parts = range(1, extents[axis] // count + 1)
    across = math.prod([*extents[:axis], count, *extents[axis + 1 :]])
    across = max(1, across)  # 0 of an empty leaf
    most = min(len(parts), most_elements // across)
    if most and not fits(axis, most * count):
      most = bisect.bisect(
        parts, False, hi=most, key=lambda part: not fits(axis, part * count)
      )
    if axis not in leaf.stacked:
      most = max(most, smallest // across)
    if most < len(parts):
      extents[axis] = _part(max(1, most), count, leaf, axis) * count
  return extents


def _part(most: int, shards: int, leaf: Leaf, axis: int) -> int:
  """The rows of a device along an axis: from `most` to about half of it.

  Those that leave the least over, on chunk borders if they can. Of an axis that
  is spread they may be a quarter, since one host writes what is left over.
  """
  fewest = most // 2 + 1 if shards == 1 else -(-most // 4)
  step = 1
  if leaf.chunk is not None:
    aligned = math.lcm(leaf.chunk[axis], shards) // shards
    step = aligned if aligned <= most else 1
  rows = leaf.shape[axis] // shards
  largest = most - most % step
  # Of those that go into the rows as often, the largest leaves the least.
  times = range(rows // largest, rows // fewest + 1)
  parts = [min(largest, rows // n // step * step) for n in times]
  return min(
    (part for part in parts if part >= fewest), key=lambda part: rows % part
  )


def _segments(
  size: int, extent: int, shards: int
) -> tuple[list[int], list[int], list[bool]]:
  """Cuts one dimension: starts, sizes, which are spread over the shards.

  What is left over at the end is not spread: its parts would share a stored
  chunk with each other, which two processes must never do.
  """
  extent -= extent % shards
  count = size // extent if extent else 0
  starts = [extent * i for i in range(count)]
  sizes, spread = [extent] * count, [True] * count
  covered = count * extent
  if covered < size or not count:
    starts.append(covered)
    sizes.append(size - covered)
    spread.append(False)
  return starts, sizes, spread


def _amplification(leaf: Leaf, extents: Sequence[int], apart: bool) -> float:
  """Bytes decoded in a read of a leaf for each byte that is used.

  Boxes inside of one piece follow each other, and what is decoded for the first
  of them is kept for the others. Layers that are read `apart` do not.
  """
  chunk = [max(1, size) for size in leaf.chunk or ()]  # 0 of an empty leaf
  touched = []
  for size, extent, step in zip(leaf.shape, extents, chunk, strict=True):
    starts = np.arange(0, size, max(extent, 1))
    ends = np.minimum(starts + extent, size)
    touched.append((ends - 1) // step - starts // step + 1)
  axes = [i for i in range(len(chunk)) if not (apart and i in leaf.stacked)]
  inside = all(np.all(touched[axis] == 1) for axis in axes)
  ratio = 1.0
  for axis, (size, step) in enumerate(zip(leaf.shape, chunk, strict=True)):
    decoded = touched[axis].sum()
    if inside and axis in axes:
      decoded = -(-size // step)
    ratio *= float(decoded) * step / max(size, 1)
  return ratio
