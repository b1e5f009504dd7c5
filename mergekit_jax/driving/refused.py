"""What a rule must not do, told as it is traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergekit_jax.rule import PyTree


@contextlib.contextmanager
def explained(method: Any) -> Iterator[None]:
  """Adds what to do to errors of a rule that needs the value of a number."""
  try:
    yield
  except (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
  ) as error:
    error.add_note(
      f'{type(method).__name__} is traced, so its numbers have no values, nor '
      'has what is computed from the models. Declare a number on which loops, '
      'branches or shapes depend as '
      "`n: int = dataclasses.field(metadata={'static': True})`."
    )
    raise


def demand_values(method: Any, returned: Any, shape: Sequence[int]) -> None:
  """Raises unless a rule returned floating-point numbers for a tensor.

  Raises:
    TypeError: if it returned something else.
    ValueError: if they have another shape and are no scalar.
  """
  if isinstance(returned, float):
    return
  name = type(method).__name__
  if not isinstance(returned, (jax.Array, np.ndarray, np.generic)):
    raise TypeError(
      f'{name} returned a {type(returned).__name__}; return the merged array.'
    )
  given = f'{name} returned {returned.dtype}{list(returned.shape)}'
  if not jnp.issubdtype(returned.dtype, jnp.floating):
    raise TypeError(f'{given}; return floating-point numbers.')
  # A row would fill the tensor in memory, and every block with its own.
  if returned.shape not in ((), tuple(shape)):
    raise ValueError(
      f'{given} for a tensor, or a part of one, of shape {list(shape)}; return '
      'an array of that shape or a scalar.'
    )


def demand_flags(method: Any, flags: PyTree, shape: Sequence[int]) -> None:
  """Raises TypeError unless what a rule reports is bool `[*shape]`."""
  for keys, flag in jax.tree.leaves_with_path(flags):
    if (jnp.result_type(flag), jnp.shape(flag)) != (jnp.bool, tuple(shape)):
      raise TypeError(
        f'{type(method).__name__} reports '
        f'{jax.tree_util.keystr(keys, simple=True)} as '
        f'{jnp.result_type(flag)}{list(jnp.shape(flag))}; report one bool an '
        f'element, here bool{list(shape)}.'
      )
