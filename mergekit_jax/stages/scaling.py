"""The stage that is λ."""

from __future__ import annotations

import jax

from mergekit_jax import checks
from mergekit_jax.kernels.product import product
from mergekit_jax.rule import Place, rule


def scale(factor: jax.typing.ArrayLike) -> Scale:
  """Multiplies a delta by λ.

  Args:
    factor: λ, a finite number.

  Returns:
    A stage: one delta, float32 `[*shape]`, to one.

  Raises:
    ValueError: if λ is not finite.
  """
  return Scale(checks.finite('scale', factor))


@rule
class Scale:
  """See `scale`."""

  factor: jax.typing.ArrayLike

  def __call__(self, t: Place, delta: jax.Array) -> jax.Array:
    del t
    if isinstance(delta, (list, tuple)):
      raise ValueError(
        f'scale() was given {len(delta)} task vectors; put a consensus that '
        'makes one of them before it, such as weighted_sum().'
      )
    return product(checks.one('scale', self.factor), delta)
