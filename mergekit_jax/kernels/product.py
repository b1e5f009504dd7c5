"""A product that rounds the same everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> jax.Array:
  """x·y, rounded to float32 before anything is added to it.

  A compiler may fuse a product with the addition that follows and round once
  instead of twice, and whether it does depends on the shape of a block. Rules
  that multiply with this give the same bits on every mesh and in every block.

  Args:
    x: float32 `[*shape]` or a scalar.
    y: likewise.

  Returns:
    float32 `[*shape]`.
  """
  x, y = (jnp.asarray(factor).astype(jnp.float32) for factor in (x, y))
  return _rounded(x * y)


@jax.custom_jvp
def _rounded(x: jax.Array) -> jax.Array:
  # Sets a bit of NaN, which leaves it NaN. What matters is that no compiler can
  # see through it to the product.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  fenced = bits | jnp.isnan(x).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(fenced, jnp.float32)


@_rounded.defjvp
def _rounded_jvp(primals, tangents):
  return _rounded(*primals), tangents[0]
