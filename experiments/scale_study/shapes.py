"""Shapes of models: small ones to train, large ones that are only compiled."""

import dataclasses

import jax.numpy as jnp

from experiments.scale_study.model import ModelConfig
from experiments.scale_study.study_config import StudyConfig
from mergekit_jax.forecasting.described import Decoder, MODELS


def small(
  *, vocabulary_size: int, width: int, layers: int, heads: int
) -> ModelConfig:
  """A model to train from scratch on short texts on a CPU.

  Widths 32, 64 and 96 with 2, 2 and 3 layers have 38, 123 and 375 thousand
  parameters where the vocabulary has 440 words.

  Args:
    vocabulary_size: number of token ids.
    width: a multiple of `heads`.
    layers: number of layers.
    heads: number of heads.
  """
  return ModelConfig(
    vocabulary_size=vocabulary_size,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=heads,
    head_size=width // heads,
    # Three matrices of 8/3 of the width cost what two of 4 would.
    hidden=8 * width // 48 * 16,
    # Short texts need few wavelengths.
    rope_base=100.0,
    convolution=3,
  )


def large(decoder: Decoder) -> ModelConfig:
  """A model as `mergekit-jax plan` describes it, to compile for a mesh."""
  return ModelConfig(
    vocabulary_size=decoder.vocab,
    width=decoder.embed,
    layers=decoder.layers,
    heads=decoder.heads,
    kv_heads=decoder.kv_heads,
    head_size=128,
    hidden=decoder.mlp,
    rope_base=500_000.0,
    norm_epsilon=1e-5,
    tied=False,
  )


def computed(shape: ModelConfig, config: StudyConfig) -> ModelConfig:
  """Returns a shape that computes as a preset says."""
  dtype = getattr(jnp, config.compute_dtype)
  return dataclasses.replace(shape, remat=config.remat, dtype=dtype)


# The sizes of Yadav et al. (2024, arXiv 2410.03617).
SIZES = {name: large(MODELS[name]) for name in ('1b', '8b', '24b', '64b')}
