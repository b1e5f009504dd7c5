"""A box is merged on each device slice by slice.

What a rule computes between models and merge is several times what it reads.
On slices that fit a core's cache none of that reaches memory, and nothing of
the size of a box is allocated but the merge itself. A slice is a block like any
other (`drive.py`): its partials add up, and its random bits are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mergekit_jax.driving import drive
from mergekit_jax.driving.block import as_bits, Block
from mergekit_jax.driving.cutting import first_slice, over_slices
from mergekit_jax.driving.reported import Flags, pack
from mergekit_jax.kernels.select import SLICE
from mergekit_jax.kernels.sums import integer_for
from mergekit_jax.rule import needs_of, PyTree, scope_of
from mergekit_jax.sharding import padded

# Elements of a slice on a CPU, as many as TIES counts by one scatter. Shorter
# ones would spend their time on adding up the partials of TIES, which are 2**16
# counts an expert.
ELEMENTS = SLICE
# Elsewhere, where a step of a loop has to be worth its start.
_ELEMENTS_ELSEWHERE = 2**24


@functools.partial(jax.jit, static_argnames='sharding')
def partials(
  sharding: NamedSharding, method: Any, block: Block, answers: Sequence[PyTree]
) -> list[PyTree]:
  """The partials of a rule's open round, added up over a box.

  Args:
    sharding: how the box lies on the mesh.
    method: a rule with an open round.
    block: the box, in every model.
    answers: the answers so far, in 32 bits.

  Returns:
    One for each total, counts in 32 bits where they cannot overflow, sums in
    64; under `scope='tensor'` with the stacked axes in front.
  """
  if not _may_be_cut(method, block):
    whole: Any = drive.advance(method, block, answers).partials
    return whole
  names = padded(sharding.spec, len(block.shape))
  apart = [names[axis] for axis in _own_answers(method, block)]
  # In the same order in every process.
  added = tuple(
    name
    for name in jax.tree.leaves(names)
    if name not in jax.tree.leaves(apart)
  )
  most = _most_elements(sharding)

  def found_in(piece: Block, answers: Sequence[PyTree]) -> list[PyTree]:
    return drive.on_layers(method, piece, answers)[0]

  def of_part(part: Block, answers: Sequence[PyTree]) -> list[PyTree]:
    like, over_layer = _sliced(found_in, method, part, answers, most)
    add_layer = functools.partial(over_layer, _add)
    sums = _nothing(like, math.prod(block.shape))
    stacked = [part.shape[axis] for axis in part.stacked]
    layers = math.prod(stacked)
    if scope_of(method) == 'model':
      sums = jax.lax.fori_loop(0, layers, add_layer, sums)
    else:
      of_layer = functools.partial(add_layer, carry=sums)
      sums = jax.lax.map(of_layer, jnp.arange(layers))
      sums = jax.tree.map(lambda x: x.reshape(*stacked, *x.shape[1:]), sums)
    if not added:
      return sums
    with jax.enable_x64(True):
      return jax.lax.psum(sums, added)

  split = _on_parts(of_part, sharding, method, block, PartitionSpec(*apart))
  return split(block, answers)


@functools.partial(jax.jit, static_argnames=('sharding', 'report'))
def merge(
  sharding: NamedSharding,
  method: Any,
  block: Block,
  answers: Sequence[PyTree],
  report: bool,
) -> tuple[jax.Array, Flags]:
  """Merges a box whose rounds are all answered.

  Args:
    sharding: how the box lies on the mesh.
    method: a rule.
    block: the box, in every model.
    answers: the answers of all its rounds, in 32 bits.
    report: whether to give its flags.

  Returns:
    The bits of the merge `[*shape]` (`block.bits_dtype`), and its flags.
  """

  def merged_of(block: Block, answers: Sequence[PyTree]) -> PyTree:
    _, merged, reported = drive.on_layers(method, block, answers, report)
    return as_bits(merged), pack(reported)

  if not _may_be_cut(method, block):
    # Which XLA would choose: who takes it goes by where it lies.
    return jax.lax.with_sharding_constraint(merged_of(block, answers), sharding)
  most = _most_elements(sharding)

  def of_part(
    part: Block, answers: Sequence[PyTree]
  ) -> tuple[jax.Array, Flags]:
    like, over_layer = _sliced(merged_of, method, part, answers, most)
    put_layer = functools.partial(over_layer, _put)
    with jax.enable_x64(True):
      merged = jax.tree.map(lambda x: jnp.zeros(part.shape, x.dtype), like)
    layers = math.prod(part.shape[axis] for axis in part.stacked)
    return jax.lax.fori_loop(0, layers, put_layer, merged)

  split = _on_parts(of_part, sharding, method, block, sharding.spec)
  return split(block, answers)


def is_sliced(method: Any) -> bool:
  """Whether a rule is merged slice by slice, of boxes that are not empty."""
  return needs_of(method) == 'element'


def _may_be_cut(method: Any, block: Block) -> bool:
  return is_sliced(method) and 0 not in block.shape


def _most_elements(sharding: NamedSharding) -> int:
  mesh: Any = sharding.mesh
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return ELEMENTS if on_cpu else _ELEMENTS_ELSEWHERE


def _own_answers(method: Any, block: Block) -> tuple[int, ...]:
  """The axes along which each layer has totals and answers of its own."""
  return block.stacked if scope_of(method) == 'tensor' else ()


def _sliced(
  of_slice: Callable[[Block, Sequence[PyTree]], PyTree],
  method: Any,
  part: Block,
  answers: Sequence[PyTree],
  most: int,
) -> tuple[PyTree, Callable[..., PyTree]]:
  """A function of a slice and its answers, made one of the layers of a part.

  Returns:
    What it gives of a slice, as shapes, and `carry = over_layer(put, number,
    carry)`, which calls `carry = put(start, shape, given, carry)` for all
    slices of a layer.
  """
  own = functools.partial(_answers_of, method, part, answers)
  like = jax.eval_shape(of_slice, first_slice(part, most), own(0))

  def over_layer(put: Callable[..., PyTree], number: Any, carry: PyTree) -> Any:
    of_layer = own(number)

    def body(start, shape, piece: Block, carry: PyTree) -> PyTree:
      return put(start, shape, of_slice(piece, of_layer), carry)

    return over_slices(part, number, most, body, carry)

  return like, over_layer


def _add(start: Any, shape: Any, found: PyTree, sums: PyTree) -> PyTree:
  """Adds the partials of a slice, wherever it lies."""
  del start, shape
  with jax.enable_x64(True):
    return jax.tree.map(jnp.add, sums, found)


def _put(
  start: Sequence[Any], shape: Sequence[int], merged: PyTree, whole: PyTree
) -> PyTree:
  """Puts the merge of a slice where it lies."""

  def put(whole: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, x.reshape(shape), start)

  return jax.tree.map(put, whole, merged)


def _on_parts(
  of_part: Callable[[Block, Sequence[PyTree]], Any],
  sharding: NamedSharding,
  method: Any,
  block: Block,
  out_specs: PartitionSpec,
) -> Callable[[Block, Sequence[PyTree]], Any]:
  """A function of each device's part of a box, made one of the box."""
  spec = padded(sharding.spec, len(block.shape))

  def moved(part: Block, answers: Sequence[PyTree]) -> Any:
    origin = [
      start + jax.lax.axis_index(names) * size if names else start
      for start, size, names in zip(part.origin, part.shape, spec, strict=True)
    ]
    return of_part(dataclasses.replace(part, origin=origin), answers)

  everywhere = PartitionSpec()
  in_specs = jax.tree.map(lambda _: everywhere, block)
  in_specs = dataclasses.replace(
    in_specs,
    base=None if block.base is None else sharding.spec,
    experts=[sharding.spec] * len(block.experts),
  )
  of_layers = [spec[axis] for axis in _own_answers(method, block)]
  return jax.shard_map(
    moved,
    mesh=sharding.mesh,
    in_specs=(in_specs, PartitionSpec(*of_layers)),
    out_specs=out_specs,
    check_vma=False,
  )


def _answers_of(
  method: Any, part: Block, answers: Sequence[PyTree], number: Any
) -> list[PyTree]:
  """The answers of one layer slice, by its number in the part."""
  axes = len(_own_answers(method, part))

  def take(answer: jax.Array) -> jax.Array:
    layers = answer.reshape(-1, *answer.shape[axes:])
    return jax.lax.dynamic_index_in_dim(layers, number, keepdims=False)

  return jax.tree.map(take, list(answers)) if axes else list(answers)


def _nothing(partials: PyTree, count: int) -> PyTree:
  """What partials that are about `count` elements are added to."""

  def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    exact = jnp.issubdtype(x.dtype, jnp.integer)
    dtype = max(x.dtype, integer_for(count)) if exact else jnp.dtype('float64')
    return jnp.zeros(x.shape, dtype)

  with jax.enable_x64(True):
    return jax.tree.map(zeros, partials)
