"""Merge fine-tuned expert models where JAX keeps them.

import mergekit_jax as mk

merged = mk.merge(mk.ties(density=0.2), [expert_1, expert_2], base)
"""

from mergekit_jax.checkpoint import Checkpoint, open_checkpoint
from mergekit_jax.kernels.gram import gram_matrix
from mergekit_jax.kernels.product import product
from mergekit_jax.kernels.select import kth_magnitude
from mergekit_jax.kernels.sums import accurate_sum, count
from mergekit_jax.merge import merge
from mergekit_jax.methods import (
  average,
  dare,
  dare_ties,
  task_arithmetic,
  ties,
)
from mergekit_jax.report import MergeReport
from mergekit_jax.rule import Place, Report, rule, together, Total
from mergekit_jax.stages import (
  chain,
  disjoint_mean,
  drop,
  scale,
  trim,
  weighted_sum,
)
from mergekit_jax.streamed import merge_checkpoints
from mergekit_jax.sweep import sweep
from mergekit_jax.version import __version__

__all__ = [
  '__version__',
  'accurate_sum',
  'average',
  'count',
  'chain',
  'Checkpoint',
  'dare',
  'dare_ties',
  'disjoint_mean',
  'drop',
  'gram_matrix',
  'kth_magnitude',
  'merge',
  'merge_checkpoints',
  'MergeReport',
  'open_checkpoint',
  'Place',
  'product',
  'Report',
  'rule',
  'scale',
  'sweep',
  'task_arithmetic',
  'ties',
  'together',
  'Total',
  'trim',
  'weighted_sum',
]
