"""Sums and counts that stay exact, or nearly so, at 64B parameters."""

from __future__ import annotations

from collections.abc import Sequence

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
