"""Merging the experts: streamed between checkpoints, and checked in memory."""

from collections.abc import Mapping, Sequence
import concurrent.futures
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from experiments.scale_study.model import Params
import mergekit_jax as mk

# The model keeps all its layers in one leaf, layers first.
STACKED_AXES = {r'(.*/)?layers/.*': 0}


def method_of(name: str, hyperparameters: Mapping[str, float]) -> Any:
  """Builds a merge method of the library from its name."""
  return getattr(mk, name)(**hyperparameters)


def merge_checkpoints(
  method: Any,
  *,
  experts: Sequence[Path],
  base: Path,
  output: Path,
  mesh: Mesh,
  seed: int,
) -> None:
  """Streams the merge of checkpoints into a new checkpoint."""
  mk.merge_checkpoints(
    method,
    experts=[str(expert) for expert in experts],
    base=str(base),
    output=str(output),
    mesh=mesh,
    seed=seed,
    stacked_axes=STACKED_AXES,
    overwrite=True,
  )


def merge_in_memory(
  methods: Mapping[str, Any],
  *,
  experts: Sequence[Params],
  base: Params,
  seed: int,
) -> dict[str, Params]:
  """Makes, by name of the method, what `merge_checkpoints` streams."""

  def merge(method: Any) -> Params:
    return mk.merge(
      method,
      experts,
      base,
      key=jax.random.key(seed),
      stacked_axes=STACKED_AXES,
    )

  # Small models take no time to merge but for XLA, which compiles on one core.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(methods, pool.map(merge, methods.values()), strict=True))


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
