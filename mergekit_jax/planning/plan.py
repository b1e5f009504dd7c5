"""The plan of a streamed merge: which boxes are read, in which order.

A *unit* is a box of one tensor, read from every model at once. The boxes tile
the tensor; each is spread evenly over the mesh, and what does not divide
becomes smaller boxes, so that nothing is ever padded. A *tiling* is the boxes
of a tensor, or of some of its layers if these have totals of their own. Several
merges of the same models share every read. The plan is made from shapes alone,
is linear in the number of tensors, and is what `mergekit-jax plan` prints.
"""

from __future__ import annotations

import collections
from collections.abc import Container, Iterator
import dataclasses
import functools
import hashlib
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mergekit_jax.rule import scope_of

READ_AHEAD = 1  # units read while one is merged
WRITE_BEHIND = 1  # units written while one is merged


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
  """A box of a tensor: where it begins, its shape, its place on the mesh."""

  origin: tuple[int, ...]
  shape: tuple[int, ...]
  spec: PartitionSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """A leaf to be merged or copied.

  Attributes:
    path: its path in the output.
    shape: its shape.
    sources: the stored dtype in every model that is read, the base first.
    dtype: the dtype of the output.
    stacked: the axes over which layers are stacked.
    boxes: the boxes that tile it.
    whole_layers: whether no box cuts a layer slice, so that totals under
      `scope='tensor'` need only the box itself.
    amplification: bytes decoded for each byte used; 1 if nothing is compressed.
  """

  path: str
  shape: tuple[int, ...]
  sources: tuple[jnp.dtype, ...]
  dtype: jnp.dtype
  stacked: tuple[int, ...]
  boxes: tuple[Box, ...]
  whole_layers: bool
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
  """Tensors that are merged by the same rules.

  Attributes:
    rules: one for each merge that is made; none if the tensors are copied.
    rounds: the rounds of totals of each rule.
    tensors: the tensors; under `scope='model'` their totals are added up.
  """

  rules: tuple[Any, ...]
  rounds: tuple[int, ...]
  tensors: tuple[Tensor, ...]

  @property
  def spans_tensors(self) -> bool:
    """Whether a rule must see all tensors before it merges the first."""
    return any(scope_of(rule) == 'model' for rule in self.rules)

  def reads(self, tensor: Tensor) -> int:
    """How often a tensor is read.

    Once if each rule can be answered from one read, else once a round of those
    that cannot and once more.
    """
    return self._reads[tensor.whole_layers]

  @functools.cached_property
  def _reads(self) -> dict[bool, int]:
    """The reads of tensors by whether their boxes hold whole layers."""
    asked = list(zip(self.rules, self.rounds, strict=True))
    return {
      whole: 1
      + max(
        (n for rule, n in asked if not answered_at_once(rule, whole)),
        default=0,
      )
      for whole in (False, True)
    }

  def tilings(self) -> Iterator[tuple[Tensor, list[Box]]]:
    """The boxes of each tensor, by layers if these have totals of their own."""
    apart = any(
      rounds and scope_of(rule) == 'tensor'
      for rule, rounds in zip(self.rules, self.rounds, strict=True)
    )
    for tensor in self.tensors:
      boxes_of = collections.defaultdict(list)
      for box in tensor.boxes:
        axes = tensor.stacked if apart else ()
        layers = tuple((box.origin[i], box.shape[i]) for i in axes)
        boxes_of[layers].append(box)
      for boxes in boxes_of.values():
        yield tensor, boxes


def answered_at_once(rule: Any, whole_layers: bool) -> bool:
  """Whether all totals of a rule on a box need nothing but the box."""
  return whole_layers and scope_of(rule) == 'tensor'


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
  """One read of one box.

  Attributes:
    number: its place in the whole plan.
    scope: the number of its scope.
    tiling: the number of the tiling it belongs to, over the whole plan: the
      boxes that share their totals under `scope='tensor'`.
    tensor: the tensor.
    box: the box.
    rounds_left: how often the box is read again; after the last read it is
      written. A rule asks its totals in the last rounds before that.
    ends_tiling: whether its tiling is complete after it, in this round.
    ends_scope: whether its scope is.
  """

  number: int
  scope: int
  tiling: int
  tensor: Tensor
  box: Box
  rounds_left: int
  ends_tiling: bool
  ends_scope: bool

  @property
  def written(self) -> bool:
    return self.rounds_left == 0

  @property
  def source_bytes(self) -> int:
    stored = sum(dtype.itemsize for dtype in self.tensor.sources)
    return math.prod(self.box.shape) * stored


@dataclasses.dataclass(frozen=True)
class Plan:
  """All scopes of a merge, the mesh, and what they will cost.

  Attributes:
    scopes: the scopes in order; leaves that are copied are the last one.
    merges: how many merges are made from one read.
    mesh: the mesh, with Auto axes.
    has_base: whether the first source of every leaf is the base.
    host_bytes: the most host memory that the merge takes at once, by the plan's
      own estimate, without imports and runtime.
    memory_budget: what it may take, in bytes.
  """

  scopes: tuple[Scope, ...]
  merges: int
  mesh: Mesh
  has_base: bool
  host_bytes: int
  memory_budget: int

  def units(self, done: Container[int] = ()) -> Iterator[Unit]:
    """All reads in order; those that are written come last in their group.

    A group is what is read together round by round: a whole scope if a rule
    asks about all its tensors, else the boxes that hold the same layers.

    Args:
      done: numbers of units whose output is written already. They are left out,
        and so are the rounds of groups that have nothing else to write.
    """
    number = first = 0
    for scope_number, scope in enumerate(self.scopes):
      tilings = list(enumerate(scope.tilings(), first))
      first += len(tilings)
      for group in [tilings] if scope.spans_tensors else ([t] for t in tilings):
        reads = [scope.reads(tensor) for _, (tensor, _) in group]
        units = []
        for rounds_left in reversed(range(max(reads))):
          for (tiling, (tensor, boxes)), own in zip(group, reads, strict=True):
            for box in boxes if rounds_left < own else ():
              ends_tiling = box is boxes[-1]
              units.append(
                Unit(
                  number,
                  scope_number,
                  tiling,
                  tensor,
                  box,
                  rounds_left,
                  ends_tiling,
                  ends_tiling and tiling == group[-1][0],
                )
              )
              number += 1
        writes = [u for u in units if u.written and u.number not in done]
        if writes:
          yield from (u for u in units if not u.written)
          yield from writes

  @functools.cached_property
  def units_digest(self) -> str:
    """Of how the merge is cut, and of the numbers journals know units by.

    How often a scope is read depends on all merges that are made together.
    """
    written = [
      [
        *(unit.number, tensor.path, str(tensor.dtype), tensor.stacked),
        *(unit.box.origin, unit.box.shape, str(unit.box.spec)),
      ]
      for unit in self.units()
      for tensor in [unit.tensor]
      if unit.written
    ]
    data = repr(written).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()

  @functools.cached_property
  def bytes_read(self) -> int:
    return sum(
      tensor.source_bytes * scope.reads(tensor)
      for scope in self.scopes
      for tensor in scope.tensors
    )

  @property
  def bytes_written(self) -> int:
    """Bytes of all merges together."""
    return self.merges * sum(
      t.output_bytes for scope in self.scopes for t in scope.tensors
    )

  @property
  def rounds(self) -> int:
    return max((max(s.rounds, default=0) for s in self.scopes), default=0)
