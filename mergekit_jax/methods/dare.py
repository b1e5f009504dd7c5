"""DARE: drop entries of the task vectors at random, rescale the others.

Yu et al., 2023, "Language models are super Mario: absorbing abilities from
homologous models as a free lunch", arXiv 2311.03099.

    mi ~ Bernoulli(1 − p)                                              drop
    τ̂i = mi τi / (1 − p)                               rescale, unbiased
    θ  = θ0 + λ Σ wi τ̂i                       or any other merge of the τ̂i
"""

from __future__ import annotations

import jax

from mergekit_jax import checks
from mergekit_jax.rule import SCOPES
from mergekit_jax.stages import (
  Chain,
  chain,
  disjoint_mean,
  drop,
  trim,
  weighted_sum,
  Weights,
)
from mergekit_jax.stages import scale as scaled


def dare(
  drop_rate: jax.typing.ArrayLike = 0.9,
  scale: jax.typing.ArrayLike = 1.0,
  weights: Weights = None,
) -> Chain:
  """DARE, then the sum of the task vectors.

  Args:
    drop_rate: probability p of dropping an entry, in [0, 1), rounded to
      1/65536. 1 − p is what others call density.
    scale: λ.
    weights: one finite number an expert; None means 1 each.

  Returns:
    A random rule without rounds.

  Raises:
    ValueError: if an argument is out of its range.
  """
  return chain(drop(drop_rate), weighted_sum(weights), scaled(scale))


def dare_ties(
  drop_rate: jax.typing.ArrayLike = 0.9,
  density: jax.typing.ArrayLike | None = None,
  scale: jax.typing.ArrayLike = 1.0,
  weights: Weights = None,
  scope: str = 'model',
  election: str = 'mass',
  zero_mass: str = 'positive',
  combine: str = 'mean',
) -> Chain:
  """DARE, then the sign election and disjoint mean of TIES.

  Args:
    drop_rate: probability p of dropping an entry, in [0, 1), rounded to
      1/65536.
    density: None lets the drop replace the trim, as in mergekit and PEFT; a
      number, rounded to millionths, trims what the drop left, as DARE's authors
      do. It is a fraction of all entries, dropped ones counted: 1 − p or more
      trims next to nothing.
    scale: λ.
    weights: one number ≥ 0 an expert; None means 1 each.
    scope: over what the trim takes its threshold, and `zero_mass='majority'`
      its majority: 'model' or 'tensor'.
    election: 'mass' or 'count'.
    zero_mass: 'positive' or 'majority'.
    combine: 'mean', or 'sum' of what agrees, mergekit's default.

  Returns:
    A random rule: no rounds, 2 with a density, one more with a majority.

  Raises:
    ValueError: if an argument is out of its range.
  """
  return chain(
    drop(drop_rate),
    *([] if density is None else [trim(density)]),
    disjoint_mean(weights, election, zero_mass, combine),
    scaled(scale),
    scope=checks.one_of('scope', scope, SCOPES),
  )
