"""Dot products of whole tensors, for rules that depend on angles and norms."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mergekit_jax.kernels.sums import accurate_sum
from mergekit_jax.rule import Answering, Total


def gram_matrix(tensors: Sequence[jax.Array]) -> Answering:
  """All dot products between N tensors over the scope, in one round.

  Slerp, multislerp, the Karcher mean and model stock depend on the experts only
  through this matrix: ask for it once, then take a weighted sum.

  Args:
    tensors: N arrays, float32 `[*shape]`.

  Yields:
    One total.

  Returns:
    float32 `[N, N]`.
  """
  count = len(tensors)
  products = [
    accurate_sum(tensors[i] * tensors[j])
    for i in range(count)
    for j in range(i + 1)
  ]

  def then(totals, answers):
    del answers
    gram = jnp.zeros((count, count), jnp.float64)
    rows, columns = jnp.tril_indices(count)
    gram = gram.at[rows, columns].set(jnp.stack(totals))
    return gram.at[columns, rows].set(jnp.stack(totals))

  return (yield Total(products, then))
