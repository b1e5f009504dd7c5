"""A box of one tensor in every model, as floats or as the bits of floats."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['base', 'experts', 'key', 'origin', 'layer'],
  meta_fields=['whole', 'stacked', 'dtype', 'sources'],
)
@dataclasses.dataclass(frozen=True)
class Block:
  """A box of one tensor, in every model.

  Attributes:
    base: the base's values, any float dtype `[*shape]`, or None.
    experts: the experts' values, each `[*shape]`.
    key: uint32 `[2]`, the random key of the leaf, or None.
    origin: where the box begins, one integer scalar a dimension.
    whole: shape of the tensor that the box is cut from, or of any in which its
      elements have the same indices.
    stacked: the axes over which layers are stacked, ascending.
    dtype: what the result is rounded to, once.
    sources: the dtypes of base and experts where the arrays hold their bits
      (`bits_dtype`); None where they are what they seem.
    layer: which layer slice of its leaf a box without stacked axes is, an
      integer scalar.
  """

  base: Any
  experts: Sequence[Any]
  key: Any
  origin: Sequence[Any]
  whole: tuple[int, ...]
  stacked: tuple[int, ...]
  dtype: jnp.dtype
  sources: tuple[jnp.dtype, ...] | None = None
  layer: Any = 0

  @property
  def shape(self) -> tuple[int, ...]:
    return self.experts[0].shape

  def floats(self) -> Block:
    """The block with arrays that are what they seem."""
    if self.sources is None:
      return self
    arrays = (
      [*self.experts] if self.base is None else [self.base, *self.experts]
    )
    arrays = [
      as_floats(*each) for each in zip(arrays, self.sources, strict=True)
    ]
    base = None if self.base is None else arrays.pop(0)
    return dataclasses.replace(self, base=base, experts=arrays, sources=None)


def bits_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """As what a stream holds elements: short floats as unsigned integers.

  XLA's CPU backend makes whole arrays of short floats longer before a loop that
  takes slices of them. Those of less than a byte, of which none is merged, have
  no unsigned integers that are as long.
  """
  short = jnp.issubdtype(dtype, jnp.floating) and (
    8 <= jnp.finfo(dtype).bits < 32
  )
  return jnp.dtype(f'uint{8 * dtype.itemsize}') if short else jnp.dtype(dtype)


def as_floats(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """What bits stand for, which were as long as `dtype`."""
  if x.dtype == dtype or bits_dtype(dtype) != x.dtype:
    return x
  return jax.lax.bitcast_convert_type(x, dtype)


def as_bits(x: jax.Array) -> jax.Array:
  """The reverse."""
  dtype = bits_dtype(x.dtype)
  return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def stand_in_shape(
  needs: str,
  shape: Sequence[int],
  stacked: Sequence[int] = (),
  size: int = 2,
) -> tuple[int, ...]:
  """A shape to trace a rule with: axes that may be cut have another size.

  Args:
    needs: what the rule needs whole.
    shape: of a tensor.
    stacked: the axes over which layers are stacked, which a rule does not see.
    size: of those that may be cut. Rows and matrices that stay whole keep
      their own.
  """
  layer = tuple(n for i, n in enumerate(shape) if i not in stacked)
  whole = {'element': 0, 'row': 1, 'matrix': len(layer)}[needs]
  cut = max(0, len(layer) - whole)
  return (size,) * cut + layer[cut:]
