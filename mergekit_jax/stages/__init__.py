"""The parts that methods on task vectors are made of.

A stage takes the task vectors τ of all experts (*deltas*) at one place and
returns them changed (a *sparsifier*) or returns one delta (a *consensus*, a
scale). `chain` strings stages together:

    ties = chain(trim(density), disjoint_mean(), scale(1.0), scope='model')
"""

from mergekit_jax.stages.chains import Chain, chain
from mergekit_jax.stages.consensus import disjoint_mean, weighted_sum
from mergekit_jax.stages.deltas import weigh, Weights
from mergekit_jax.stages.scaling import scale
from mergekit_jax.stages.sparsifiers import drop, trim

__all__ = [
  'Chain',
  'Weights',
  'chain',
  'disjoint_mean',
  'drop',
  'scale',
  'trim',
  'weigh',
  'weighted_sum',
]
