"""The merge in memory, with which the streamed one has to agree."""

from collections.abc import Mapping, Sequence
import concurrent.futures
from typing import Any

import jax
import numpy as np

from experiments.scale_study.model import Params, STACKED_AXES
import mergekit_jax as mk


def demand_same(
  streamed: Mapping[str, tuple[Any, Params]],
  experts: Sequence[Params],
  base: Params,
  seed: int,
) -> None:
  """Refuses streamed merges that are not, bit by bit, the merges in memory.

  Args:
    streamed: rules and what they made, by name.
    experts: parameters of the experts merged.
    base: its parameters.
    seed: of the random numbers.

  Raises:
    RuntimeError: if one differs; the message names its leaves.
  """

  def unequal(merge: tuple[Any, Params]) -> list[str]:
    rule, params = merge
    key = jax.random.key(seed)
    return unequal_leaves(
      params,
      mk.merge(rule, experts, base, key=key, stacked_axes=STACKED_AXES),
    )

  # Small models take no time to merge but for XLA, which compiles on one core.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = dict(
      zip(streamed, pool.map(unequal, streamed.values()), strict=True)
    )
  if any(found.values()):
    raise RuntimeError(
      'Streamed merges differ from those in memory, which is an error of the '
      'library: '
      + '; '.join(
        f'{name} at {paths}' for name, paths in found.items() if paths
      )
    )


def unequal_leaves(merged: Params, expected: Params) -> list[str]:
  """Compares two models bit by bit and returns the paths that differ."""
  differs = jax.tree.map(
    lambda one, two: not np.array_equal(_bits(one), _bits(two)),
    merged,
    expected,
  )
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, unequal in jax.tree.leaves_with_path(differs)
    if unequal
  ]


def _bits(leaf: jax.Array) -> np.ndarray:
  # Compared as integers, a negative zero is not zero and NaN equals itself.
  return np.asarray(leaf).view(np.uint32)
