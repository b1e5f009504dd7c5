"""Task arithmetic: θ = θ0 + λ Σ wi τi, with τi = θi − θ0.

Ilharco et al., 2023, "Editing models with task arithmetic", arXiv 2212.04089.
"""

from __future__ import annotations

import jax

from mergekit_jax.stages import Chain, chain, weighted_sum, Weights
from mergekit_jax.stages import scale as scaled


def task_arithmetic(
  scale: jax.typing.ArrayLike = 1.0, weights: Weights = None
) -> Chain:
  """Adds the sum of the task vectors to the base.

  A sum, not a mean: scale = 1/N is averaging. Good scales fall as the experts
  become more; the study of this repository finds 0.7 for two, 0.35 for eight.

  Args:
    scale: λ.
    weights: one finite number an expert; None means 1 each. A negative weight
      takes a task away.

  Returns:
    A rule: elementwise, no rounds.

  Raises:
    ValueError: if the scale or a weight is not finite.
  """
  return chain(weighted_sum(weights), scaled(scale))
