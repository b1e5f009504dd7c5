"""Partial sums are added in 64 bits, and rules see their answers in 32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergekit_jax.rule import PyTree

_KINDS = {
  jnp.signedinteger: 'int',
  jnp.unsignedinteger: 'uint',
  jnp.floating: 'float',
}


def wide_add(trees: Sequence[PyTree]) -> PyTree:
  """Adds trees of partial sums in int64 and float64."""
  with jax.enable_x64(True):
    return jax.tree.map(lambda *leaves: sum(map(widen, leaves)), *trees)


def widen(x: jax.Array) -> jax.Array:
  """A partial sum in 64 bits. Under `enable_x64`."""
  return jnp.asarray(x).astype(wide_dtype(x.dtype))


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of 64 bits in which partial sums are added.

  Raises:
    TypeError: if it is of neither integers nor floats.
  """
  for kind, name in _KINDS.items():
    if jnp.issubdtype(dtype, kind):
      return jnp.dtype(f'{name}64')
  raise TypeError(
    f'A partial of a Total has dtype {dtype}; give integers or floats.'
  )


def narrow(x: jax.Array) -> jax.Array:
  """An answer as rules see it; what is no number stays as it is."""
  return x.astype(_narrow_dtype(x.dtype))


def narrow_spec(x: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype that `narrow` would give."""
  return jax.ShapeDtypeStruct(jnp.shape(x), _narrow_dtype(x.dtype))


def _narrow_dtype(dtype: jnp.dtype) -> jnp.dtype:
  for kind, name in _KINDS.items():
    if jnp.issubdtype(dtype, kind):
      return jnp.dtype(f'{name}32')
  return dtype
