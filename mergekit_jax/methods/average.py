"""Averaging: θ = Σ wi θi / Σ wi.

Wortsman et al., 2022, "Model soups: averaging weights of multiple fine-tuned
models improves accuracy without increasing inference time", arXiv 2203.05482.
"""

from __future__ import annotations

import jax.numpy as jnp

from mergekit_jax import checks
from mergekit_jax.kernels.product import product
from mergekit_jax.rule import Place, rule
from mergekit_jax.stages import weigh, Weights


def average(weights: Weights = None) -> Average:
  """The weighted mean of the experts. Needs no base.

  Args:
    weights: one number ≥ 0 an expert; None means 1 each. Only their ratios
      matter.

  Returns:
    A rule: elementwise, no rounds.

  Raises:
    ValueError: if a weight is negative or not finite, or all are 0, or one is
      neither 0 nor between 1e-18 and 1e18.
  """
  return Average(checks.weights(weights, at_least=0))


@rule
class Average:
  """See `average`."""

  weights: Weights

  def __call__(self, t: Place):
    total = sum(weigh(t.experts, self.weights))
    if self.weights is None:
      return total / len(t.experts)
    # In float32, whatever they are given in. Not a quotient: XLA makes one of
    # it for a single element and a product for several, with other bits.
    weight = sum(jnp.asarray(w).astype(jnp.float32) for w in self.weights)
    return product(total, 1 / weight)
