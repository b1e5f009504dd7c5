"""Stages that leave some entries of the task vectors, and drop the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mergekit_jax import checks
from mergekit_jax.kernels.product import product
from mergekit_jax.kernels.select import kth_magnitude
from mergekit_jax.rule import Place, Report, rule, together
from mergekit_jax.stages.deltas import Deltas, demand_several


def trim(density: jax.typing.ArrayLike) -> Trim:
  """Keeps the largest magnitudes of each task vector, drops the rest.

  A sparsifier of TIES (Yadav et al., 2023, arXiv 2306.01708).

  Args:
    density: the fraction kept, in (0, 1], rounded to millionths. Equal
      magnitudes at the cut are all kept; 1 keeps everything.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to as many of these.

  Raises:
    ValueError: if the density is not in (0, 1].
  """
  return Trim(checks.within('density', density, 0, 1, closed=(False, True)))


@rule
class Trim:
  """See `trim`."""

  density: jax.typing.ArrayLike

  def __call__(self, t: Place, deltas: Deltas):
    del t
    demand_several(self, deltas)
    density = checks.one('density', self.density)
    thresholds = yield from together(
      kth_magnitude(delta, density) for delta in deltas
    )
    # Where as many are NaN as are to be kept, these are.
    thresholds = [jnp.where(jnp.isnan(x), jnp.inf, x) for x in thresholds]
    trimmed = [
      jnp.where(jnp.abs(delta) < threshold, 0, delta)  # keeps NaN
      for delta, threshold in zip(deltas, thresholds, strict=True)
    ]
    yield Report(density=[delta != 0 for delta in trimmed])
    return trimmed


def drop(drop_rate: jax.typing.ArrayLike) -> Drop:
  """Drops each entry at random and rescales the others, unbiased.

  The sparsifier of DARE (Yu et al., 2023, arXiv 2311.03099).

  Args:
    drop_rate: probability p of dropping, in [0, 1), rounded to 1/65536;
      survivors are multiplied by 1 / (1 − p) with the rounded p.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to as many of these.

  Raises:
    ValueError: if the drop rate is not in [0, 1).
  """
  return Drop(checks.within('drop_rate', drop_rate, 0, 1, (True, False)))


@rule
class Drop:
  """See `drop`."""

  drop_rate: jax.typing.ArrayLike

  def __call__(self, t: Place, deltas: Deltas):
    demand_several(self, deltas)
    levels = 2**16
    drop_rate = checks.one('drop_rate', self.drop_rate)
    dropped = jnp.round(jnp.float32(levels) * drop_rate)
    dropped = jnp.minimum(dropped, levels - 1)
    rescale = levels / (levels - dropped)
    kept = [
      t.random_bits(i) >= dropped.astype(jnp.uint32) for i in range(len(deltas))
    ]
    yield Report(density=kept)
    return [
      jnp.where(mask, product(delta, rescale), 0)
      for mask, delta in zip(kept, deltas, strict=True)
    ]
