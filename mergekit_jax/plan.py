"""The plan of a streamed merge: which boxes are read, in which order.

A *unit* is a box of one tensor, read from every model at once. The boxes tile
the tensor; each is spread evenly over the mesh, and what does not divide
becomes smaller boxes, so that nothing is ever padded. The plan is made from
shapes alone, is linear in the number of tensors, and is what `mergekit-jax
plan` prints.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from mergekit_jax import drive, sharding
from mergekit_jax.rule import needs_of, scope_of

READ_AHEAD = 1  # units read while one is merged
WRITE_BEHIND = 1  # units written while one is merged
_SMALLEST_PART = 64 * 2**10  # bytes of one model on one device
_LARGEST_BOX = (
  64 * 2**20
)  # bytes of one model on one host, unless it saves reads


@dataclasses.dataclass(frozen=True)
class Box:
  """A box of a tensor: where it begins, its shape, its place on the mesh."""

  origin: tuple[int, ...]
  shape: tuple[int, ...]
  spec: PartitionSpec

  @property
  def index(self) -> tuple[slice, ...]:
    return tuple(
      slice(start, start + size)
      for start, size in zip(self.origin, self.shape, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A leaf to be merged or copied.

  Attributes:
    path: its path below the parameter root.
    shape: its shape.
    sources: the stored dtype in every model that is read, the base first.
    dtype: the dtype of the output.
    stacked: the axes over which layers are stacked.
    boxes: the boxes that tile it.
    read_once: whether each box holds whole layer slices under `scope='tensor'`,
      so that all rounds are answered from one read.
    amplification: bytes decoded for each byte used; 1 if nothing is compressed.
  """

  path: str
  shape: tuple[int, ...]
  sources: tuple[jnp.dtype, ...]
  dtype: jnp.dtype
  stacked: tuple[int, ...]
  boxes: tuple[Box, ...]
  read_once: bool
  amplification: float

  @property
  def source_bytes(self) -> int:
    """Bytes of one read of this tensor in all models."""
    return math.prod(self.shape) * sum(d.itemsize for d in self.sources)

  @property
  def output_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Scope:
  """Tensors whose totals are taken together, and their rule (None: copied)."""

  rule: Any
  rounds: int
  tensors: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
  """One read of one box.

  Attributes:
    number: its place in the whole plan.
    scope: the number of its scope.
    tensor: the tensor.
    box: the box.
    round: which round of its scope this is.
    written: whether this is the last round, after which the box is written.
    ends_round: whether the totals of the round are complete after it.
  """

  number: int
  scope: int
  tensor: Tensor
  box: Box
  round: int
  written: bool
  ends_round: bool = False

  @property
  def source_bytes(self) -> int:
    stored = sum(dtype.itemsize for dtype in self.tensor.sources)
    return math.prod(self.box.shape) * stored


@dataclasses.dataclass(frozen=True)
class Plan:
  """All scopes of a merge, the mesh, and what they will cost.

  Attributes:
    scopes: the scopes in order; leaves that are copied are the last one.
    mesh: the mesh, with Auto axes.
    host_bytes: the most host memory that the merge takes at once, by the plan's
      own estimate, without imports and runtime.
    memory_budget: what it may take, in bytes.
  """

  scopes: tuple[Scope, ...]
  mesh: Mesh
  host_bytes: int
  memory_budget: int

  def units(self, done: Container[int] = ()) -> Iterator[Unit]:
    """All reads in order. Every scope ends with the reads that are written.

    Args:
      done: numbers of units whose output is written already. They are left out,
        and so are the rounds of scopes that have nothing else to write.
    """
    number = 0
    for scope_number, scope in enumerate(self.scopes):
      reads = []
      for round_ in range(scope.rounds + 1):
        last = round_ == scope.rounds
        of_round = [
          Unit(number + i, scope_number, tensor, box, round_, last)
          for i, (tensor, box) in enumerate(
            (tensor, box)
            for tensor in scope.tensors
            if last or not tensor.read_once
            for box in tensor.boxes
          )
        ]
        number += len(of_round)
        if of_round and not last:
          of_round[-1] = dataclasses.replace(of_round[-1], ends_round=True)
        reads += of_round
      writes = [u for u in reads if u.written and u.number not in done]
      if writes:
        yield from (u for u in reads if not u.written)
        yield from writes

  @property
  def bytes_read(self) -> int:
    return sum(
      tensor.source_bytes * (1 if tensor.read_once else scope.rounds + 1)
      for scope in self.scopes
      for tensor in scope.tensors
    )

  @property
  def bytes_written(self) -> int:
    return sum(t.output_bytes for scope in self.scopes for t in scope.tensors)

  @property
  def rounds(self) -> int:
    return max((scope.rounds for scope in self.scopes), default=0)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What the plan needs to know of a leaf; `chunk` only where compressed."""

  path: str
  shape: tuple[int, ...]
  sources: tuple[jnp.dtype, ...]
  dtype: jnp.dtype
  stacked: tuple[int, ...] = ()
  chunk: tuple[int, ...] | None = None

  @property
  def itemsize(self) -> int:
    """Bytes of an element in the model that stores it widest."""
    return max(dtype.itemsize for dtype in self.sources)


def make_plan(
  scopes: Sequence[tuple[Any, Sequence[Leaf]]],
  mesh: Mesh,
  memory_budget: int,
  has_base: bool,
  partition_rules: Mapping[str, PartitionSpec] | None = None,
  decoding_bytes: int = 0,
) -> Plan:
  """Cuts every leaf into boxes that fit the memory budget.

  Args:
    scopes: rules (None to copy) and their leaves.
    mesh: a mesh with Auto axes.
    memory_budget: bytes of host memory.
    has_base: whether the first source of each leaf is the base.
    partition_rules: partition specs by regular expression of a path.
    decoding_bytes: host memory that the sources take beside the buffers.

  Returns:
    The plan.

  Raises:
    ValueError: if the smallest possible unit does not fit the budget, a
      partition rule matches nothing or does not fit, or a rule needs a base.
  """
  shapes = {leaf.path: leaf.shape for _, leaves in scopes for leaf in leaves}
  given = sharding.partitions(partition_rules, shapes, mesh)
  costs = _Costs(mesh, memory_budget, has_base, decoding_bytes)
  planned = []
  for rule, leaves in scopes:
    rounds = costs.rounds(rule, leaves[0])
    planned.append(
      Scope(
        rule,
        rounds,
        tuple(
          _cut(rule, rounds, leaf, given.get(leaf.path), costs)
          for leaf in leaves
        ),
      )
    )
  return Plan(tuple(planned), mesh, costs.most, memory_budget)


class _Costs:
  """Host memory of a unit, and the largest seen so far."""

  def __init__(
    self, mesh: Mesh, budget: int, has_base: bool, decoding_bytes: int
  ):
    self.mesh = mesh
    self.budget = budget
    self.has_base = has_base
    self.decoding_bytes = decoding_bytes
    self.most = 0
    self.hosts = len({device.process_index for device in mesh.devices.flat})
    self._partials: dict[Any, tuple[int, int]] = {}

  def rounds(self, rule: Any, leaf: Leaf) -> int:
    return self._asked(rule, leaf)[0]

  def _asked(self, rule: Any, leaf: Leaf) -> tuple[int, int]:
    """The rounds of a rule, and the bytes of the partials of a layer slice."""
    if rule is None:
      return 0, 0
    rank = len(leaf.shape) - len(leaf.stacked)
    key = (id(rule), rank, len(leaf.sources))
    if key not in self._partials:
      values = jax.ShapeDtypeStruct((2,) * rank, jnp.float32)
      count = len(leaf.sources) - self.has_base
      block = drive.Block(
        values if self.has_base else None,
        [values] * count,
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        (0,) * rank,
        values.shape,
        (),
        values.dtype,
      )
      partials = drive.questions(rule, block)
      sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(partial))
        for partial in partials
      ]
      self._partials[key] = len(partials), max(sizes, default=0)
    return self._partials[key]

  def of(self, rule: Any, leaf: Leaf, shape: Sequence[int]) -> int:
    """Host memory, in bytes, while boxes of this shape are merged.

    The buffers of the reads under way and of the unit being merged, the outputs
    being written, what the kernels keep of each element (measured: a float32
    for every model and one more), the partial sums of each layer slice with the
    copies that answering them takes, and what decoding the sources takes.
    """
    elements = -(-math.prod(shape) // self.hosts)
    layers = math.prod(shape[axis] for axis in leaf.stacked)
    _, partial_bytes = self._asked(rule, leaf)
    stored = sum(dtype.itemsize for dtype in leaf.sources)
    per_element = stored * (1 + READ_AHEAD)
    per_element += leaf.dtype.itemsize * (1 + WRITE_BEHIND)
    if rule is not None:
      per_element += 4 * (len(leaf.sources) + 1)
    return (
      elements * per_element + 4 * layers * partial_bytes + self.decoding_bytes
    )


def _cut(
  rule: Any,
  rounds: int,
  leaf: Leaf,
  spec: PartitionSpec | None,
  costs: _Costs,
) -> Tensor:
  """Cuts one leaf into boxes."""
  if spec is None:
    spec = sharding.partition(
      leaf.shape, costs.mesh, leaf.stacked, _SMALLEST_PART // leaf.itemsize
    )
  shards = sharding.shards(spec, len(leaf.shape), costs.mesh)
  extents = _extents(rule, rounds, leaf, shards, costs)
  boxes = tuple(
    Box(
      tuple(start for start, _, _ in segments),
      tuple(size for _, size, _ in segments),
      PartitionSpec(
        *(
          axes if sharded else None
          for axes, (_, _, sharded) in zip(
            sharding.padded(spec, len(leaf.shape)), segments, strict=True
          )
        )
      ),
    )
    for segments in itertools.product(
      *map(_segments, leaf.shape, extents, shards)
    )
  )
  whole = all(
    size == leaf.shape[axis]
    for box in boxes
    for axis, size in enumerate(box.shape)
    if axis not in leaf.stacked
  )
  return Tensor(
    leaf.path,
    leaf.shape,
    leaf.sources,
    leaf.dtype,
    leaf.stacked,
    boxes,
    rounds == 0 or (whole and scope_of(rule) == 'tensor'),
    _amplification(leaf, extents),
  )


def _extents(
  rule: Any, rounds: int, leaf: Leaf, shards: Sequence[int], costs: _Costs
) -> list[int]:
  """The shape of the largest boxes of a leaf that fit the budget.

  Stacked axes are cut first, since layers do not need each other, then the
  leading axes, so that a box stays a run of bytes.
  """
  unstacked = [i for i in range(len(leaf.shape)) if i not in leaf.stacked]
  needs = 'element' if rule is None else needs_of(rule)
  cuttable = {'element': unstacked, 'row': unstacked[:-1], 'matrix': []}[needs]
  extents = list(leaf.shape)
  smallest = _SMALLEST_PART // leaf.itemsize * math.prod(shards)

  def fits() -> bool:
    if costs.of(rule, leaf, extents) > costs.budget:
      return False
    if rounds and scope_of(rule) == 'tensor':
      if all(extents[i] == leaf.shape[i] for i in unstacked):
        return True
    on_host = math.prod(extents) * leaf.itemsize // costs.hosts
    return on_host <= _LARGEST_BOX

  for axis in (*leaf.stacked, *cuttable):
    while extents[axis] > shards[axis] and not fits():
      if axis not in leaf.stacked and math.prod(extents) <= smallest:
        break
      extents[axis] = _half(extents[axis], shards[axis], leaf, axis)
  cost = costs.of(rule, leaf, extents)
  if cost > costs.budget:
    raise ValueError(
      f'memory_budget={costs.budget:,} bytes is too small: the smallest unit '
      f'of {leaf.path} {leaf.shape} takes {cost:,} bytes. Give at least that.'
    )
  costs.most = max(costs.most, cost)
  return extents


def _half(extent: int, shards: int, leaf: Leaf, axis: int) -> int:
  """About half an extent: even over the shards, on chunk borders if it can."""
  most = max(1, extent // (2 * shards))
  step = 1
  if leaf.chunk is not None:
    aligned = math.lcm(leaf.chunk[axis], shards) // shards
    step = aligned if aligned <= most else 1
  rows = leaf.shape[axis] // shards
  # Of the part sizes from here to half of it, one that leaves the least over.
  candidates = range(most - most % step, most // 2, -step)
  best = min(candidates, key=lambda part: rows % part)
  return best * shards


def _segments(
  size: int, extent: int, shards: int
) -> list[tuple[int, int, bool]]:
  """Cuts one dimension: (start, size, whether it is spread over the shards).

  What is left over at the end is not spread: its parts would share a stored
  chunk with each other, which two processes must never do.
  """
  extent -= extent % shards
  starts = range(0, size - extent + 1, extent) if extent else ()
  segments = [(start, extent, True) for start in starts]
  covered = len(segments) * extent
  if covered < size or not segments:
    segments.append((covered, size - covered, False))
  return segments


def _amplification(leaf: Leaf, extents: Sequence[int]) -> float:
  """Bytes decoded for each byte that is used; 1 where nothing is compressed."""
  if leaf.chunk is None:
    return 1.0
  ratio = 1.0
  for size, extent, chunk in zip(leaf.shape, extents, leaf.chunk, strict=True):
    starts = np.arange(0, size, max(extent, 1))
    ends = np.minimum(starts + extent, size)
    touched = (ends - 1) // chunk - starts // chunk + 1
    ratio *= float(np.sum(touched)) * chunk / max(size, 1)
  return ratio
