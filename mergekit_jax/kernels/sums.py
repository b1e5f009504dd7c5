"""Sums and counts that stay exact, or nearly so, at 64B parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INT32_LIMIT = 2**31
_LONG_ROW = 2**14
_SHORT_ROW = 2**7


def count(mask: jax.Array) -> jax.Array:
  """How many elements are true.

  Args:
    mask: bool `[*shape]`.

  Returns:
    An integer scalar, int32 where that cannot overflow, else int64.
  """
  with jax.enable_x64(mask.size >= _INT32_LIMIT):
    return jnp.sum(mask, dtype=integer_for(mask.size))


def integer_for(size: int) -> jnp.dtype:
  """int32 if it can count `size` elements, else int64 (needs 64-bit types)."""
  return jnp.dtype('int32' if size < _INT32_LIMIT else 'int64')


def accurate_sum(values: jax.Array) -> jax.Array:
  """The sum of all elements, added in float64.

  Args:
    values: float32 `[*shape]`.

  Returns:
    A float64 scalar.
  """
  with jax.enable_x64(True):
    return jnp.sum(values.astype(jnp.float64))


def summed_over(
  mesh: Any, names: str | tuple[str, ...], x: jax.Array
) -> jax.Array:
  """The sum of what devices hold, inside of `shard_map`.

  Args:
    mesh: the devices, a `Mesh`.
    names: axes of the mesh over which is added.
    x: integers or floats `[*shape]`, of 32 bits or of 64.

  Returns:
    An array like `x`, the same on all these devices.
  """
  if x.dtype.itemsize < 8 or has_wide_collectives(mesh):
    return jax.lax.psum(x, names)
  # Both halves have 32 bits.
  if jnp.issubdtype(x.dtype, jnp.floating):
    high = x.astype(jnp.float32)
    low = (x - high.astype(x.dtype)).astype(jnp.float32)
    unit = 1
  else:
    high = (x >> 32).astype(jnp.int32)
    low = (x & 0xFFFFFFFF).astype(jnp.uint32)
    unit = 2**32
  every = lambda half: jax.lax.all_gather(half, names).astype(x.dtype)
  return jnp.sum(every(high) * unit + every(low), axis=0)


def has_wide_collectives(mesh: Any) -> bool:
  """Whether devices add 64-bit numbers among each other.

  A TPU holds one as two of 32 bits, and XLA does not rewrite an all-reduce of
  them (github.com/pytorch/xla/issues/1952). Its float64 is a sum of two
  float32, so nothing is lost if these travel apart.
  """
  return mesh.devices.flat[0].platform != 'tpu'


def sums_in_passing(values: Sequence[jax.Array]) -> list[jax.Array]:
  """The sums of several arrays, from one pass over their elements.

  One reduction of all arrays together fuses with what computes them: nothing is
  stored, where a reduction for each would store every array. Rows are added in
  float32 and the row sums in float64, and long rows that cannot be cut into
  shorter ones in float64: relative errors are about 1e-6, and counts of true
  elements are exact.

  Args:
    values: float32 or bool arrays `[*shape]` of one shape.

  Returns:
    A float64 scalar for each.
  """
  values = [jnp.atleast_1d(value) for value in values]
  add = lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True))
  length = values[0].shape[-1]
  if length > _LONG_ROW:
    cut = next(n for n in range(_LONG_ROW, 0, -1) if length % n == 0)
    if cut >= _SHORT_ROW:
      values = [x.reshape(*x.shape[:-1], length // cut, cut) for x in values]
  with jax.enable_x64(True):
    dtype = 'float32' if values[0].shape[-1] <= _LONG_ROW else 'float64'
    rows = jax.lax.reduce(
      tuple(value.astype(dtype) for value in values),
      tuple(np.zeros((), dtype) for _ in values),
      add,
      (values[0].ndim - 1,),
    )
    return [jnp.sum(row.astype('float64')) for row in rows]
