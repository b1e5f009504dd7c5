"""What of the sources is worth a warning before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mergekit_jax import roots, tree
from mergekit_jax.job import Job

# Elements from which on a matrix of whole numbers may hold weights.
_FEWEST_CODES = 2**12


def warnings_of(job: Job) -> list[str]:
  """All warnings that need nothing but the structure of the base."""
  specs = job.models[0].checkpoint.specs
  paths = job.models[0].paths
  read = {path: specs[paths[path]] for path in paths}
  return [
    *_left_out(job.left_out),
    *_quantised(read, job.copied),
    *_complex(read, job.copied),
  ]


def _left_out(paths: Sequence[str]) -> list[str]:
  """Of leaves beside the root that are no training state anybody knows."""
  unknown = [
    path
    for path in paths
    if not roots.is_training_state(path) and not roots.is_of_optimizer(path)
  ]
  if not unknown:
    return []
  return [
    f'{len(unknown)} leaves of the base lie beside its parameters and are not '
    f'in the output: {_some(unknown)}.'
  ]


def _quantised(leaves: Mapping[str, Any], copied: Sequence[str]) -> list[str]:
  """Of leaves that may hold codes of weights: a mean of codes is no weight.

  Matrices of whole numbers are copied, while the scales that belong to them are
  merged; floats of 8 bits are merged as what they are without their scales.
  """
  codes = [
    path
    for path in copied
    if jnp.issubdtype(leaves[path].dtype, jnp.integer)
    and len(leaves[path].shape) > 1
    and leaves[path].size >= _FEWEST_CODES
  ]
  scaled = [
    path
    for path, leaf in leaves.items()
    if tree.is_merged(leaf.dtype)
    and leaf.dtype.itemsize == 1
    and any(f'{path}_{scale}' in leaves for scale in ('scale', 'scale_inv'))
  ]
  warnings = []
  if codes:
    warnings.append(
      f'{len(codes)} leaves of whole numbers are copied from the base and not '
      f'merged: {_some(codes)}. If they hold quantised weights, the output is '
      'of no use: store the models as floating-point numbers first.'
    )
  if scaled:
    warnings.append(
      f'{len(scaled)} leaves of 8 bits have scales beside them, which are not '
      f'applied before the merge: {_some(scaled)}. Store the models as '
      'floating-point numbers first.'
    )
  return warnings


def _complex(leaves: Mapping[str, Any], copied: Sequence[str]) -> list[str]:
  """Of complex numbers: they are weights, and rules compute in float32."""
  paths = [
    path
    for path in copied
    if jnp.issubdtype(leaves[path].dtype, jnp.complexfloating)
  ]
  if not paths:
    return []
  return [
    f'{len(paths)} leaves of complex numbers are copied from the base and not '
    f'merged: {_some(paths)}. Store their real and imaginary parts as leaves '
    'of their own first.'
  ]


def _some(paths: Sequence[str]) -> str:
  return f'{", ".join(paths[:5])}{", …" if paths[5:] else ""}'
