"""Task vectors of several experts, as stages take and weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergekit_jax import checks
from mergekit_jax.kernels.product import product

Deltas = Sequence[jax.Array]
Weights = Sequence[jax.typing.ArrayLike] | jax.Array | None


def demand_several(stage: Any, deltas: Any) -> None:
  """Refuses one delta, along whose rows a stage would go as if experts."""
  if not isinstance(deltas, (list, tuple)):
    raise ValueError(
      f'{type(stage).__name__} takes the task vectors of all experts, but the '
      'stage before it in the chain makes one of them. Put it before the '
      'consensus, of which a chain has one.'
    )


def weigh(values: Sequence[jax.Array], weights: Weights) -> list[jax.Array]:
  """Each value times its expert's weight, float32.

  Args:
    values: one array an expert, `[*shape]`.
    weights: one number an expert, or None for 1 each.

  Raises:
    ValueError: if there are not as many weights as experts, or one is an
      array.
  """
  if weights is None:
    return [value.astype(jnp.float32) for value in values]
  if len(weights) != len(values):
    raise ValueError(
      f'{len(weights)} weights were given for {len(values)} experts; give '
      'one weight for each expert, in the same order.'
    )
  return [
    product(value, jnp.asarray(checks.one('weight', weight), jnp.float32))
    for value, weight in zip(values, weights, strict=True)
  ]
