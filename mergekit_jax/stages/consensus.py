"""Stages that make one task vector of those of all experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mergekit_jax import checks
from mergekit_jax.kernels.sums import count
from mergekit_jax.rule import Place, Report, rule, Total
from mergekit_jax.stages.deltas import (
  Deltas,
  demand_several,
  weigh,
  Weights,
)


def weighted_sum(weights: Weights = None) -> WeightedSum:
  """Consensus: Σ wi τi (Ilharco et al., 2022, arXiv 2212.04089).

  Args:
    weights: one finite number an expert; None means 1 each.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to one of these.

  Raises:
    ValueError: if a weight is not finite or, as they are merged, there are not
      as many as experts.
  """
  return WeightedSum(checks.weights(weights))


@rule
class WeightedSum:
  """See `weighted_sum`."""

  weights: Weights

  def __call__(self, t: Place, deltas: Deltas):
    del t
    demand_several(self, deltas)
    yield Report(sign_conflict=_sign_conflict(deltas))
    return sum(weigh(deltas, self.weights))


def disjoint_mean(
  weights: Weights = None,
  election: str = 'mass',
  zero_mass: str = 'positive',
  combine: str = 'mean',
) -> DisjointMean:
  """Consensus: elects a sign per entry, averages the experts that agree.

  As in TIES (Yadav et al., 2023, arXiv 2306.01708).

  Args:
    weights: one number ≥ 0 an expert; None means 1 each. The mean divides by
      the sum of the weights of the experts that agree.
    election: 'mass' elects the sign of the sum of the weighted deltas, 'count'
      the sign of the sum of their signs.
    zero_mass: what is elected where that sum is exactly 0: 'positive', or
      'majority', the majority of the elected signs over the scope, else
      positive, at the price of one more round.
    combine: 'mean', or 'sum', which does not divide.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to one of these.

  Raises:
    ValueError: if a weight is negative, not finite, or neither 0 nor between
      1e-18 and 1e18, `election`, `zero_mass` or `combine` is unknown or, as
      they are merged, there are not as many weights as experts.
  """
  return DisjointMean(
    checks.weights(weights, at_least=0),
    checks.one_of('election', election, ('mass', 'count')),
    checks.one_of('zero_mass', zero_mass, ('positive', 'majority')),
    checks.one_of('combine', combine, ('mean', 'sum')),
  )


@rule
class DisjointMean:
  """See `disjoint_mean`."""

  weights: Weights
  election: str
  zero_mass: str
  combine: str

  def __call__(self, t: Place, deltas: Deltas):
    del t
    demand_several(self, deltas)
    weighted = weigh(deltas, self.weights)
    votes = weighted if self.election == 'mass' else map(jnp.sign, weighted)
    elected = jnp.sign(sum(votes))
    tie = jnp.float32(1)
    if self.zero_mass == 'majority':
      positive, negative = count(elected > 0), count(elected < 0)
      tie = yield Total((positive, negative), _majority)
    elected = jnp.where(elected == 0, tie, elected)
    yield Report(sign_conflict=_sign_conflict(deltas))
    # By the deltas alone: no gradient could else tell an expert of weight 0
    # from one that disagrees.
    along = [delta * elected for delta in deltas]
    agree = [x > 0 for x in along]
    agreed = [jnp.where(x > 0, x, 0) for x in along]
    total = elected * sum(weigh(agreed, self.weights))
    if self.combine == 'mean':
      weight = sum(weigh(agree, self.weights))
      none = weight == 0
      total = jnp.where(none, 0, total / jnp.where(none, 1, weight))
    return jnp.where(jnp.isnan(elected), jnp.nan, total)


def _majority(total, answers):
  del answers
  positive, negative = total
  return jnp.where(negative > positive, -1.0, 1.0)


def _sign_conflict(deltas: Deltas) -> tuple[jax.Array, jax.Array]:
  """Entries that experts move in both directions, of those that any moves."""
  up = functools.reduce(jnp.logical_or, [delta > 0 for delta in deltas])
  down = functools.reduce(jnp.logical_or, [delta < 0 for delta in deltas])
  return up & down, up | down
