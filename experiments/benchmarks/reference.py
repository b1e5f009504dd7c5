"""What a merge of one tensor should be, in plain numpy and float64.

Written from the papers, without a line of the library. Some elements hang on
the last bit of float32: those whose magnitude is that of the trim, and those
whose experts cancel out where a sign is elected. They are *at an edge*, and
right either way.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import ml_dtypes
import numpy as np

_STORED_BITS = 8  # of a bfloat16's significand
_FLOAT32 = 2.0**-24  # half a unit in the last place of 1


@dataclasses.dataclass(frozen=True)
class Expected:
  """A merge of one tensor.

  Attributes:
    merged: float64 `[*shape]`.
    terms: float64 `[*shape]`, the sum of the magnitudes of all that is added,
      which bounds the error of adding it in float32.
    edge: bool `[*shape]`.
  """

  merged: np.ndarray
  terms: np.ndarray
  edge: np.ndarray


def average(base: np.ndarray, experts: Sequence[np.ndarray]) -> Expected:
  """The mean of the experts."""
  del base
  terms = np.mean(np.abs(experts), axis=0)
  return Expected(np.mean(experts, axis=0), terms, np.zeros(terms.shape, bool))


def task_arithmetic(
  base: np.ndarray, experts: Sequence[np.ndarray], scale: float
) -> Expected:
  """base + scale · Σ τ."""
  deltas = np.stack(experts) - base
  terms = np.abs(base) + np.abs(scale) * np.sum(np.abs(deltas), axis=0)
  merged = base + scale * np.sum(deltas, axis=0)
  return Expected(merged, terms, np.zeros(terms.shape, bool))


def ties(
  base: np.ndarray, experts: Sequence[np.ndarray], density: float
) -> Expected:
  """Trims each task vector of the tensor, elects, takes the disjoint mean."""
  deltas = np.stack(experts) - base
  kept = max(1, round(density * 1e6) * base.size // 10**6)
  edge = np.zeros(base.shape, bool)
  for delta in deltas:
    magnitude = np.abs(delta)
    cut = np.partition(magnitude, base.size - kept, axis=None)[-kept]
    edge |= np.abs(magnitude - cut) <= np.spacing(np.float32(cut))
    delta[magnitude < cut] = 0
  return _disjoint_mean(base, deltas, edge)


def dare_ties(
  base: np.ndarray,
  experts: Sequence[np.ndarray],
  drop_rate: float,
  kept: Sequence[np.ndarray],
) -> Expected:
  """Keeps what is said, rescales, elects, takes the disjoint mean.

  Args:
    base: float64 `[*shape]`.
    experts: each float64 `[*shape]`.
    drop_rate: the fraction dropped, by which is rescaled.
    kept: bool `[*shape]` for each expert.
  """
  deltas = (np.stack(experts) - base) * np.stack(kept) / (1 - drop_rate)
  return _disjoint_mean(base, deltas, np.zeros(base.shape, bool))


def _disjoint_mean(
  base: np.ndarray, deltas: np.ndarray, edge: np.ndarray
) -> Expected:
  mass = np.sum(deltas, axis=0)
  magnitudes = np.sum(np.abs(deltas), axis=0)
  tied = np.abs(mass) <= np.spacing(magnitudes.astype(np.float32))
  elected = np.where(mass >= 0, 1, -1)
  agree = deltas * elected > 0
  count = np.maximum(np.sum(agree, axis=0), 1)
  merged = base + np.sum(np.where(agree, deltas, 0), axis=0) / count
  return Expected(
    merged, np.abs(base) + magnitudes, edge | (tied & (magnitudes > 0))
  )


def judge(
  output: np.ndarray, base: np.ndarray, experts: int, expected: Expected
) -> dict[str, float]:
  """Compares a stored tensor with what it should be.

  Args:
    output: float64 `[*shape]`, the stored bfloat16 values.
    base: float64 `[*shape]`.
    experts: how many were merged.
    expected: what should have come out.

  Returns:
    Numbers of elements: `edge`, and of the others `outside`, those that are
    further off than one rounding to bfloat16 after float32 arithmetic; and sums
    of squares over these others: of the error, of the error that rounding the
    expected value makes, and of the task vector that the merge should have
    added.
  """
  error = np.abs(output - expected.merged)
  exponent = np.frexp(expected.merged)[1]
  half = np.where(
    expected.merged == 0, 0, np.ldexp(0.5, exponent - _STORED_BITS)
  )
  # A float32 rounding for each model and operation on the way.
  slack = (experts + 4) * _FLOAT32 * expected.terms
  clear = ~expected.edge
  stored = expected.merged.astype(ml_dtypes.bfloat16).astype(np.float64)
  return {
    'elements': error.size,
    'edge': int(np.sum(expected.edge)),
    'outside': int(np.sum((error > half + slack) & clear)),
    'error': float(np.sum(error[clear] ** 2)),
    'rounding': float(np.sum((stored - expected.merged)[clear] ** 2)),
    'added': float(np.sum((expected.merged - base)[clear] ** 2)),
  }
