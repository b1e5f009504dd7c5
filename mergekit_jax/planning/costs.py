"""What a unit costs: the host memory it takes, and what its rule asks."""

from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mergekit_jax import sharding
from mergekit_jax.driving import drive, questions
from mergekit_jax.driving.block import stand_in_shape
from mergekit_jax.driving.slices import ELEMENTS, is_sliced
from mergekit_jax.planning.plan import READ_AHEAD, WRITE_BEHIND
from mergekit_jax.rule import needs_of, scope_of


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
  """What the plan needs to know of a leaf.

  Attributes:
    path: its path.
    shape: its shape.
    sources: the stored dtype in every model.
    dtype: the dtype of the output.
    stacked: the axes over which layers are stacked.
    chunk: the shape of what is decoded at once; None if nothing is compressed.
    stored: the shape of what lies in one piece in the first model; None if that
      is not known.
  """

  path: str
  shape: tuple[int, ...]
  sources: tuple[jnp.dtype, ...]
  dtype: jnp.dtype
  stacked: tuple[int, ...] = ()
  chunk: tuple[int, ...] | None = None
  stored: tuple[int, ...] | None = None

  @property
  def itemsize(self) -> int:
    """Bytes of an element in the model that stores it widest."""
    return max(_itemsizes(self.sources))

  @property
  def itemsizes(self) -> int:
    """Bytes of an element in all models together."""
    return sum(_itemsizes(self.sources))

  def layers(self, shape: Sequence[int]) -> int:
    """How many layer slices a box of this shape has."""
    return math.prod([shape[axis] for axis in self.stacked])

  @property
  def layout(self) -> tuple[Any, ...]:
    """All but the path: leaves of one layout are cut alike."""
    return _LAYOUT(self)


@functools.cache
def _itemsizes(dtypes: Sequence[jnp.dtype]) -> tuple[int, ...]:
  return tuple(dtype.itemsize for dtype in dtypes)


_LAYOUT = operator.attrgetter(
  *(field.name for field in dataclasses.fields(Leaf) if field.name != 'path')
)


class Costs:
  """Host memory of a unit."""

  def __init__(
    self,
    mesh: Mesh,
    budget: int,
    *,
    has_base: bool,
    decoding_bytes: int,
    merges: int,
    hosts: int | None,
  ):
    self.mesh = mesh
    self.budget = budget
    self.has_base = has_base
    self.decoding_bytes = decoding_bytes
    self.merges = merges
    held = collections.Counter(d.process_index for d in mesh.devices.flat)
    self.hosts = hosts or len(held)
    # Of the host that holds most of them.
    self.local_devices = mesh.size // hosts if hosts else max(held.values())
    self._partials: dict[Any, tuple[int, int]] = {}
    self._parts: dict[Any, tuple[bool, int, int]] = {}
    self._needs: dict[Any, set[str]] = {}
    # Few of these differ, however many leaves there are.
    self.spread_along = functools.cache(sharding.spread_along)
    self.shards = functools.cache(
      lambda spec, rank: sharding.shards(spec, rank, mesh)
    )

  def held(self, shape: Sequence[int], shards: int) -> int:
    """The elements of a box, spread over so many devices, on one host."""
    return -(-math.prod(shape) * min(shards, self.local_devices) // shards)

  def spread(self, elements: int, shards: int) -> int:
    """The elements of a box of which one host holds as many as given."""
    return elements * shards // min(shards, self.local_devices)

  def replicas(self, shards: int) -> int:
    """How many devices of a host hold, and compute, the same elements."""
    return max(1, self.local_devices // shards)

  def needs(self, rules: Sequence[Any]) -> set[str]:
    """What the rules need whole."""
    known = tuple(map(id, rules))
    if known not in self._needs:
      self._needs[known] = {*map(needs_of, rules)}
    return self._needs[known]

  def rounds(self, rule: Any, leaves: Sequence[Leaf]) -> int:
    """The rounds of a rule on the leaves of a scope."""
    asked = {self.asked(rule, leaf)[0] for leaf in leaves}
    if len(asked) > 1:
      raise drive.unlike_rounds(rule)
    return asked.pop()

  def asked(self, rule: Any, leaf: Leaf) -> tuple[int, int]:
    """The rounds of a rule, and the bytes of the partials of a layer slice."""
    shape = self._stand_in_shape(rule, leaf)
    known = (id(rule), shape, len(leaf.sources))
    if known not in self._partials:
      experts = len(leaf.sources) - self.has_base
      key = jax.ShapeDtypeStruct((2,), jnp.uint32)
      block = questions.stand_in(shape, experts, self.has_base, key)
      partials = questions.asked(rule, block)
      sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(partial))
        for partial in partials
      ]
      self._partials[known] = len(partials), max(sizes, default=0)
    return self._partials[known]

  def _stand_in_shape(self, rule: Any, leaf: Leaf) -> tuple[int, ...]:
    """Of a layer slice."""
    (needs,) = self.needs([rule])
    return stand_in_shape(needs, leaf.shape, leaf.stacked)

  def of(
    self,
    rules: Sequence[Any],
    leaf: Leaf,
    shape: Sequence[int],
    shards: int,
  ) -> int:
    """Host memory, in bytes, while boxes of this shape are merged.

    The buffers of the reads under way and of the unit being merged, the outputs
    of every merge being written and the flags beside them, what every device's
    kernel keeps of the elements that it has under way at once (a float32 for
    every model and one more), the partial sums of each layer slice with the
    copies that answering them takes, and what decoding the sources takes.
    """
    elements = self.held(shape, shards)
    written = leaf.dtype.itemsize * (1 + WRITE_BEHIND) * self.merges
    computed = elements * self.replicas(shards)
    cut, of_box, of_layer = self._parts_of(rules, leaf)
    at_once = 0
    if rules:
      # Each expert reports one flag, and the consensus two.
      written += -(-(len(leaf.sources) + 2) // 8)
      most = ELEMENTS * self.local_devices if cut else computed
      at_once = min(computed, most) * 4 * (len(leaf.sources) + 1)
    return (
      elements * leaf.itemsizes * (1 + READ_AHEAD)
      + computed * written
      + at_once
      + 4 * (of_box + of_layer * leaf.layers(shape))
      + self.decoding_bytes
    )

  def partial_bytes(
    self, rules: Sequence[Any], leaf: Leaf, shape: Sequence[int]
  ) -> int:
    """The partial sums of a box, in bytes.

    Those of all layer slices, but where slices are merged one after another and
    the totals are about all of them.
    """
    _, of_box, of_layer = self._parts_of(rules, leaf)
    return of_box + of_layer * leaf.layers(shape)

  def _parts_of(
    self, rules: Sequence[Any], leaf: Leaf
  ) -> tuple[bool, int, int]:
    """Whether all rules are merged slice by slice, and bytes of partial sums.

    Those of a box, however many layers it has, and those of each of its layers.
    """
    shapes = (self._stand_in_shape(rule, leaf) for rule in rules)
    known = (*map(id, rules), *shapes, len(leaf.sources))
    if known not in self._parts:
      of_box = of_layer = 0
      for rule in rules:
        size = self.asked(rule, leaf)[1]
        if scope_of(rule) == 'model' and is_sliced(rule):
          of_box += size
        else:
          of_layer += size
      self._parts[known] = all(map(is_sliced, rules)), of_box, of_layer
    return self._parts[known]
