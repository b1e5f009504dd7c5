"""Sums and counts that stay exact, or nearly so, at 64B parameters."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_INT32_LIMIT = 2**31


def count(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How many elements are true, and how many there are.

  Args:
    mask: bool `[*shape]`.

  Returns:
    Two integer scalars, int32 where that cannot overflow, else int64.
  """
  with jax.enable_x64(mask.size >= _INT32_LIMIT):
    dtype = integer_for(mask.size)
    return jnp.sum(mask, dtype=dtype), jnp.asarray(mask.size, dtype)


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
  float32 and the row sums in float64: relative errors are about 1e-6.

  Args:
    values: float32 arrays `[*shape]` of one shape.

  Returns:
    A float64 scalar for each.
  """
  values = [jnp.atleast_1d(value) for value in values]
  rows = jax.lax.reduce(
    tuple(values),
    tuple(jnp.float32(0) for _ in values),
    lambda left, right: tuple(x + y for x, y in zip(left, right, strict=True)),
    (values[0].ndim - 1,),
  )
  with jax.enable_x64(True):
    return [jnp.sum(row.astype(jnp.float64)) for row in rows]
