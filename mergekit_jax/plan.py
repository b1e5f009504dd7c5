"""The plan of a streamed merge: which boxes are read, in which order.

A *unit* is a box of one tensor, read from every model at once. The boxes tile
the tensor; each is spread evenly over the mesh, and what does not divide
becomes smaller boxes, so that nothing is ever padded. The plan is made from
shapes alone, is linear in the number of tensors, and is what `mergekit-jax
plan` prints.
"""

from __future__ import annotations

import collections
from collections.abc import Container, Iterator
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mergekit_jax.rule import scope_of

READ_AHEAD = 1  # units read while one is merged
WRITE_BEHIND = 1  # units written while one is merged


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
  """Tensors that share a rule (None: copied) and, under 'model', its totals."""

  rule: Any
  rounds: int
  tensors: tuple[Tensor, ...]

  def groups(self) -> Iterator[list[tuple[Tensor, Box]]]:
    """The boxes whose totals are taken together.

    All of them under `scope='model'`; else those that hold the same layers of a
    tensor.
    """
    if self.rule is None or scope_of(self.rule) == 'model':
      yield [(t, box) for t in self.tensors for box in t.boxes]
      return
    for tensor in self.tensors:
      layers = collections.defaultdict(list)
      for box in tensor.boxes:
        held = [(box.origin[i], box.shape[i]) for i in tensor.stacked]
        layers[tuple(held)].append((tensor, box))
      yield from layers.values()


@dataclasses.dataclass(frozen=True)
class Unit:
  """One read of one box.

  Attributes:
    number: its place in the whole plan.
    scope: the number of its scope.
    group: which boxes it shares its totals with.
    tensor: the tensor.
    box: the box.
    round: which round of its scope this is.
    written: whether this is the last round, after which the box is written.
    ends_round: whether the totals of the round are complete after it.
  """

  number: int
  scope: int
  group: int
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
    """All reads in order. Every group ends with the reads that are written.

    Args:
      done: numbers of units whose output is written already. They are left out,
        and so are the rounds of groups that have nothing else to write.
    """
    number = group = 0
    for scope_number, scope in enumerate(self.scopes):
      for boxes in scope.groups():
        reads = []
        for round_ in range(scope.rounds + 1):
          last = round_ == scope.rounds
          for tensor, box in boxes:
            if last or not tensor.read_once:
              reads.append(
                Unit(number, scope_number, group, tensor, box, round_, last)
              )
              number += 1
          if reads and not last:
            reads[-1] = dataclasses.replace(reads[-1], ends_round=True)
        group += 1
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
