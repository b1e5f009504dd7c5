"""Bootstrap intervals of what is computed from means over subsets and seeds.

Seeds are the independent repetitions: base, experts and subsets are drawn anew
with each. With three seeds or more, seeds are drawn with replacement and bring
all their subsets along, since drawing the subsets of a drawn seed once more
counts their scatter twice (Davison and Hinkley, 1997, Bootstrap Methods and
their Application, section 3.8). With fewer seeds only subsets are drawn, and
the interval says nothing about another seed. One draw serves all sizes, bases
and methods, so that differences between them are paired.

What cannot be drawn (an N of one subset with fewer than three seeds, an arm
with fewer seeds than that) has no interval, nor has any statistic that counts
it: held fixed it would make the interval too narrow, left out it would make it
one of another statistic.

A bootstrap of few draws is too narrow: with three seeds a 95 % percentile
interval covers the truth in about 75 %. Both ends are therefore moved away from
the estimate by √(n / (n − 1)) · t / z, with the 97.5 % quantiles of Student's
distribution of n − 1 degrees of freedom and of the normal distribution
(Hesterberg, 2015, arXiv 1411.5279): 2.7 for three seeds, 1.6 for five.

Best − worst grows with the noise of what it is of, and resamples have more of
that: they may lie on one side of the estimate alone. There its error cannot be
told from them, and an interval would end on the estimate itself: it has none.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import NamedTuple
import warnings

import numpy as np
import scipy  # whose modules load, for a second, once they are used

# Fewer seeds than this say nothing about the seeds that were not run.
MINIMUM_SEEDS = 3

LEVEL = 0.95
_DRAWS = 2000
_SEED = 0
# Differences of ratios that are nothing but rounding.
_ROUNDING = 1e-9

Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
  """A value and its interval, NaN where there is none; arrays of one shape."""

  value: np.ndarray
  low: np.ndarray
  high: np.ndarray


def estimate(
  values: np.ndarray, statistic: Statistic = lambda means: means
) -> Estimate:
  """Averages over subsets, then over seeds, and finds an interval.

  Args:
    values: of every merge, [seeds, subsets, *arms, n]; NaN where there is none.
      How many subsets a seed has may depend on the last axis alone.
    statistic: what to compute from the means, [..., *arms, n] to
      [..., *result]; it must not mix the leading axes.

  Returns:
    The statistic of the means, [*result], and its interval.
  """
  by_seed = mean(values, axis=1)
  means = mean(by_seed, axis=0)
  value = np.asarray(statistic(means), float)
  generator = np.random.default_rng(_SEED)
  by_seed = by_seed[~np.isnan(by_seed.reshape(len(by_seed), -1)).all(1)]
  seeds = len(by_seed)
  if seeds >= MINIMUM_SEEDS:
    draws = mean(by_seed[generator.integers(seeds, size=(_DRAWS, seeds))], 1)
    run = np.isfinite(by_seed).sum(axis=0)
    draws = np.where(run >= MINIMUM_SEEDS, draws, np.nan)
    # Of a study under way, some arms may have fewer seeds than others.
    units = int(run[run >= MINIMUM_SEEDS].min(initial=seeds))
  else:
    units, draws = _draws_of_subsets(values, generator)
  undrawn: np.ndarray = np.all(np.isnan(draws), axis=0)
  bounds = _quantiles(np.asarray(statistic(draws), float))
  low, high = np.where(_hangs_on(statistic, means, undrawn), np.nan, bounds)
  # Without any scatter both ends are on the value, and it is known.
  one_sided = (value - low < _ROUNDING) != (high - value < _ROUNDING)
  low, high = np.where(one_sided, np.nan, (low, high))
  widening = widening_of(units)
  return Estimate(
    value,
    value - widening * np.maximum(value - low, 0),
    value + widening * np.maximum(high - value, 0),
  )


@functools.cache
def widening_of(units: int) -> float:
  """Returns by how much the interval of so few draws is too narrow."""
  if units < 2:
    return math.nan
  upper = (1 + LEVEL) / 2
  student = scipy.stats.t.ppf(upper, units - 1) / scipy.stats.norm.ppf(upper)
  return math.sqrt(units / (units - 1)) * float(student)


def student_interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the ends of Student's interval of a mean; NaN for fewer than two.

  With three values their smallest is the 2.5 % quantile of a bootstrap, which
  therefore is lopsided by luck; Student's is not, but assumes a normal
  distribution.
  """
  if len(values) < 2:
    return math.nan, math.nan
  upper = scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
  reach = float(upper * scipy.stats.sem(values))
  center = float(np.mean(values))
  return center - reach, center + reach


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
  """Averages what is not NaN; NaN where nothing is left."""
  present = ~np.isnan(values)
  count = present.sum(axis)
  total = np.where(present, values, 0).sum(axis)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draws_of_subsets(
  values: np.ndarray, generator: np.random.Generator
) -> tuple[int, np.ndarray]:
  """Draws subsets within every seed, for every number of experts apart."""
  units, draws = [], []
  for column in np.moveaxis(values, -1, 0):
    seeds, _, *arms = column.shape
    flat = column.reshape(*column.shape[:2], -1)
    subsets = np.flatnonzero((~np.isnan(flat)).any(axis=(0, 2)))
    if len(subsets) < 2:
      draws.append(np.full((_DRAWS, *arms), np.nan))
      continue
    units.append(len(subsets))
    chosen = generator.choice(subsets, size=(_DRAWS, seeds, len(subsets)))
    drawn = column[np.arange(seeds)[:, None], chosen]
    draws.append(mean(mean(drawn, axis=2), axis=1))
  return min(units, default=0), np.stack(draws, axis=-1)


def _hangs_on(
  statistic: Statistic, means: np.ndarray, some: np.ndarray
) -> np.ndarray:
  """Returns whether a statistic counts some of the means that there are."""
  # What counts an infinite mean is not finite.
  probe = np.where(some & ~np.isnan(means), np.inf, means)
  with np.errstate(invalid='ignore'):
    return ~np.isfinite(statistic(probe))


def _quantiles(draws: np.ndarray) -> np.ndarray:
  with warnings.catch_warnings():
    # An arm that was never run has no draws, and its interval is NaN.
    warnings.filterwarnings('ignore', 'All-NaN slice', RuntimeWarning)
    return np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
