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

  def or_else(self, where: np.ndarray, other: Expected) -> Expected:
    """What another one says of the elements `where` is right too."""
    more = np.repeat(self.choices[:1], len(other.choices), axis=0)
    more[:, where] = other.choices
    return Expected(np.concatenate([self.choices, more]), self.terms)


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
  tied = np.abs(mass) <= 2 * _FLOAT32 * magnitudes
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
    bool `[experts, n]`: of all choices the first, from few entries to many,
    whose disjoint mean the output is within one rounding to bfloat16; if there
    is none, the one that it is nearest to.
  """
  choices = itertools.product([False, True], repeat=len(deltas))
  choices = np.array(sorted(choices, key=sum))
  taken = np.zeros(output.size, int)
  left = np.arange(output.size)
  best = np.full(output.size, np.inf)
  of_left = output, base, deltas, kept, free
  for number, choice in enumerate(choices):
    stored, origin, vectors, fixed, open_ = of_left
    chosen = np.where(open_, choice[:, None], fixed)
    merged = disjoint_mean(origin, vectors * chosen).choices[0]
    beyond = np.abs(stored - merged) - rounding(merged)
    taken[left[beyond < best]] = number
    best = np.minimum(beyond, best)
    going = best > 0
    left, best = left[going], best[going]
    of_left = [np.compress(going, array, axis=-1) for array in of_left]
  return np.where(free, choices[taken].T, kept)


def rounding(values: np.ndarray) -> np.ndarray:
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
  # A float32 rounding for each model and operation on the way.
  slack = (experts + 4) * _FLOAT32 * expected.terms
  merged = expected.choices[0].copy()
  beyond = np.abs(output - merged) - rounding(merged) - slack
  wrong = np.flatnonzero(beyond > 0)
  beyond = beyond[wrong]
  for choice in expected.choices[1:, wrong]:
    other = np.abs(output[wrong] - choice) - rounding(choice) - slack[wrong]
    nearer = other < beyond
    merged[wrong[nearer]] = choice[nearer]
    beyond = np.minimum(beyond, other)
  outside = int(np.sum(beyond > 0))
  stored = merged.astype(ml_dtypes.bfloat16).astype(np.float64)
  return {
    'elements': output.size,
    'edge': wrong.size - outside,
    'outside': outside,
    'error': float(np.sum((output - merged) ** 2)),
    'rounding': float(np.sum((stored - merged) ** 2)),
    'added': float(np.sum((merged - base) ** 2)),
  }
