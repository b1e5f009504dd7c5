"""TIES: trim each task vector, elect a sign, average what agrees.

Yadav et al., 2023, "TIES-Merging: resolving interference when merging models",
arXiv 2306.01708.

    τ̂i = τi where |τi| is among its largest `density`, else 0        trim
    γ  = sgn(Σ wi τ̂i)                                                elect
    τ  = Σ{i: sgn(τ̂i) = γ} wi τ̂i / Σ{i: sgn(τ̂i) = γ} wi    disjoint mean
    θ  = θ0 + λ τ
"""

from __future__ import annotations

import jax

from mergekit_jax import checks
from mergekit_jax.rule import SCOPES
from mergekit_jax.stages import Chain, chain, disjoint_mean, trim, Weights
from mergekit_jax.stages import scale as scaled


def ties(
  density: jax.typing.ArrayLike = 0.2,
  scale: jax.typing.ArrayLike = 1.0,
  weights: Weights = None,
  scope: str = 'model',
  election: str = 'mass',
  zero_mass: str = 'positive',
  combine: str = 'mean',
) -> Chain:
  """TIES merging, with the trim over the whole task vector as its authors do.

  Args:
    density: the fraction of each task vector that is kept, in (0, 1], rounded
      to millionths.
    scale: λ.
    weights: one number ≥ 0 an expert; None means 1 each.
    scope: over what the trim takes its threshold (and `zero_mass='majority'`
      its majority): 'model', the whole task vector, or 'tensor', as mergekit
      and PEFT do.
    election: 'mass' (the authors) or 'count'.
    zero_mass: 'positive', or 'majority' (the authors).
    combine: 'mean', or 'sum' of what agrees, mergekit's `normalize: false`.

  Returns:
    A rule of 2 rounds, 3 with `zero_mass='majority'`.

  Raises:
    ValueError: if an argument is out of its range.
  """
  return chain(
    trim(density),
    disjoint_mean(weights, election, zero_mass, combine),
    scaled(scale),
    scope=checks.one_of('scope', scope, SCOPES),
  )
