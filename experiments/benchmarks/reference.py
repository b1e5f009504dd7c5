"""What a merge of some elements should be, in plain numpy and float64.

Written from the papers and the design, without a line of the library: task
vectors are rounded to float32, and a trim keeps all entries of the magnitude of
the last one that it keeps. One thing hangs on the last bit of float32: the sign
that is elected where experts cancel out. There either sign is right.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools

import ml_dtypes
import numpy as np

_EXPONENT = 0x7FF << 52  # of a float64's bits
_STORED_BITS = 8  # of a bfloat16's significand
_FLOAT32 = 2.0**-24  # half a unit in the last place of 1


@dataclasses.dataclass(frozen=True)
class Expected:
  """A merge of some elements.

  Attributes:
    choices: float64 `[choices, n]`, all of them right; the first is what the
      definition says to the letter.
    terms: float64 `[n]`, the sum of the magnitudes of all that is added, which
      bounds the error of adding it in float32.
  """

  choices: np.ndarray
  terms: np.ndarray

  def or_else(self, other: Expected) -> Expected:
    """What another one says is right too."""
    return Expected(np.concatenate([self.choices, other.choices]), self.terms)


def task_vectors(
  base: np.ndarray, experts: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """What each expert changed, rounded to float32, float32 `[n]` each."""
  single = base.astype(np.float32)
  return [expert.astype(np.float32) - single for expert in experts]


def cut(delta: np.ndarray, density: float) -> np.ndarray:
  """The magnitude of the last entry that a trim of a task vector keeps."""
  kept = max(1, round(density * 1e6) * delta.size // 10**6)
  return np.partition(np.abs(delta), delta.size - kept)[-kept]


def average(experts: np.ndarray) -> Expected:
  """The mean of the experts, float64 `[experts, n]`."""
  merged = np.mean(experts, axis=0)
  return Expected(merged[None], np.mean(np.abs(experts), axis=0))


def task_arithmetic(
  base: np.ndarray, deltas: np.ndarray, scale: float
) -> Expected:
  """base + scale · Σ τ, of float64 `[n]` and `[experts, n]`."""
  merged = base + scale * np.sum(deltas, axis=0)
  magnitudes = np.sum(np.abs(deltas), axis=0)
  return Expected(merged[None], np.abs(base) + np.abs(scale) * magnitudes)


def disjoint_mean(base: np.ndarray, deltas: np.ndarray) -> Expected:
  """Elects signs, and adds the mean of the entries that have them.

  Args:
    base: float64 `[n]`.
    deltas: float64 `[experts, n]`, 0 where an entry was trimmed or dropped.

  Returns:
    Two choices, with different signs where the mass is 0 but for the last bit
    of float32, and the same elsewhere.
  """
  mass = np.sum(deltas, axis=0)
  magnitudes = np.sum(np.abs(deltas), axis=0)
  merged = base + _mean_of_sign(deltas, mass >= 0)
  other = merged.copy()
  tied = np.abs(mass) <= np.spacing(magnitudes.astype(np.float32))
  tied = np.flatnonzero(tied & (magnitudes > 0))
  other[tied] = base[tied] + _mean_of_sign(deltas[:, tied], mass[tied] < 0)
  return Expected(np.stack([merged, other]), np.abs(base) + magnitudes)


def _mean_of_sign(deltas: np.ndarray, positive: np.ndarray) -> np.ndarray:
  agree = np.where(positive, deltas > 0, deltas < 0)
  total = np.sum(deltas * agree, axis=0)
  return total / np.maximum(np.sum(agree, axis=0), 1)


def likely_kept(
  output: np.ndarray,
  base: np.ndarray,
  deltas: np.ndarray,
  kept: np.ndarray,
  free: np.ndarray,
) -> np.ndarray:
  """Which entries were kept, as far as an output tells.

  Args:
    output: float64 `[n]`, the stored values.
    base: float64 `[n]`.
    deltas: float64 `[experts, n]`.
    kept: bool `[experts, n]`.
    free: bool `[experts, n]`, where `kept` says nothing: who merged has chosen.

  Returns:
    bool `[experts, n]`: of all choices the one whose disjoint mean, rounded to
    bfloat16, the output fits best.
  """
  kept = kept & ~free
  left = np.flatnonzero(free.any(axis=0))
  best = np.full(left.size, np.inf)
  # First the choice of nothing, which most elements were left with if few are
  # kept at all; who fits exactly is not asked again.
  for choice in itertools.product([False, True], repeat=len(deltas)):
    left, best = left[best > -np.inf], best[best > -np.inf]
    chosen = free[:, left] & np.array(choice)[:, None]
    chosen |= kept[:, left] & ~free[:, left]
    merged = disjoint_mean(base[left], deltas[:, left] * chosen).choices[0]
    error = np.abs(output[left] - merged)
    error = np.where(error == 0, -np.inf, error - _rounding(merged))
    better = error < best
    kept[:, left[better]] = chosen[:, better]
    best = np.minimum(error, best)
  return kept


def _rounding(values: np.ndarray) -> np.ndarray:
  """Half a unit in the last place of bfloat16, of float64 values; 0 of 0."""
  power = (values.view(np.int64) & _EXPONENT).view(np.float64)
  return power * 2.0**-_STORED_BITS


def judge(
  output: np.ndarray, base: np.ndarray, experts: int, expected: Expected
) -> dict[str, float]:
  """Compares stored elements with what they should be.

  Args:
    output: float64 `[n]`, the stored bfloat16 values.
    base: float64 `[n]`.
    experts: how many were merged.
    expected: what should have come out.

  Returns:
    Numbers of elements: all; `edge`, those that are not as the first choice is
    but as another; `outside`, those that are further from every choice than one
    rounding to bfloat16 after float32 arithmetic. And sums of squares over all
    of them, by the choice that fits: of the error, of the error that rounding
    the expected value makes, and of the task vector that the merge should have
    added.
  """
  choices = expected.choices
  # A float32 rounding for each model and operation on the way.
  slack = (experts + 4) * _FLOAT32 * expected.terms
  beyond = np.abs(output - choices) - (_rounding(choices) + slack)
  fits = np.where(beyond[0] <= 0, 0, np.argmin(beyond, axis=0))
  merged = np.take_along_axis(choices, fits[None], axis=0)[0]
  outside = np.min(beyond, axis=0) > 0
  stored = merged.astype(ml_dtypes.bfloat16).astype(np.float64)
  return {
    'elements': output.size,
    'edge': int(np.sum((beyond[0] > 0) & ~outside)),
    'outside': int(np.sum(outside)),
    'error': float(np.sum((output - merged) ** 2)),
    'rounding': float(np.sum((stored - merged) ** 2)),
    'added': float(np.sum((merged - base) ** 2)),
  }
