"""Partial sums are added in 64 bits, and rules see their answers in 32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

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


def movable(tree: PyTree) -> PyTree:
  """Small arrays that computations on any devices may use.

  The leaves of a model may lie on different ones. What cannot be seen here,
  traced or in part on other hosts, stays where it is.
  """
  with jax.enable_x64(True):
    return jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x)) if _is_here(x) else x, tree
    )


def _is_here(x: Any) -> bool:
  is_array = isinstance(x, jax.Array) and not isinstance(x, Tracer)
  return is_array and x.is_fully_addressable


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


def narrow_number(x: Any) -> Any:
  """A number of a rule as its partials see it, for its answers too."""
  with jax.enable_x64(False):
    # Those of Python go by the type of what they meet, and still do.
    return narrow(x) if hasattr(x, 'dtype') else jnp.asarray(x)


def narrow_spec(x: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype that `narrow` would give."""
  return jax.ShapeDtypeStruct(jnp.shape(x), _narrow_dtype(x.dtype))


def _narrow_dtype(dtype: jnp.dtype) -> jnp.dtype:
  for kind, name in _KINDS.items():
    if jnp.issubdtype(dtype, kind):
      return jnp.dtype(f'{name}32')
  return dtype
