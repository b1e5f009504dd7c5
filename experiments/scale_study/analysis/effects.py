"""What each finding of the paper comes down to: one paired effect.

Every effect is signed so that the paper's claim is that it is above 0. It is
the mean of its parts, such as one a size and method, which are kept to be seen.
"""

from collections.abc import Callable
import dataclasses
import itertools

import numpy as np

from experiments.scale_study.analysis.aggregate import (
  BASE,
  Grid,
  METHOD,
  N,
  SEED,
  SIZE,
  SUBSET,
)
from experiments.scale_study.analysis.bootstrap import mean, Statistic
from experiments.scale_study.analysis.measures import (
  held_out,
  Measure,
  over_multitask,
)

# From this many experts the paper sees large strong models beat multitask.
_MANY_EXPERTS = 6


@dataclasses.dataclass(frozen=True)
class Effect:
  """An effect that can be estimated.

  Attributes:
    unit: what a number of it means.
    values: of the merges that enter, [seeds, subsets, sizes, bases, methods,
      n]; NaN elsewhere.
    parts: from means, [..., sizes, bases, methods, n], to [..., *parts].
    axes: names along each axis of the parts.
    note: what else there is to know of it, if anything.
  """

  unit: str
  values: np.ndarray
  parts: Statistic
  axes: tuple[tuple[str, ...], ...]
  note: str = ''


# Returns an effect, or why the grid cannot show it.
Finder = Callable[[Grid, Measure], Effect | str]


def base_quality(grid: Grid, measure: Measure) -> Effect | str:
  """Finding 1: instruction-tuned − pretrained, at equal size and largest N.

  Paired by size, method, seed and subset, over the categories that may be
  counted for both bases; then the mean over sizes and methods. Of sizes where
  the instruction-tuned base passed as the better one, unmerged, with each seed.
  """
  if len(grid.bases) < 2:
    return f'needs both bases; only {", ".join(grid.bases)} was run'
  better = [grid.results.is_better_base(size) for size in grid.sizes]
  if not any(better):
    return 'the instruction-tuned base is nowhere the better one, held-in'
  values = grid.alike(BASE).values(measure)
  values[:, :, ~np.array(better)] = np.nan
  return Effect(
    f'instruction-tuned − pretrained, held-in at N = {grid.ns[-1]}',
    _paired(values[..., [-1]], (BASE,)),
    lambda means: means[..., 1, :, 0] - means[..., 0, :, 0],
    (grid.sizes, grid.methods),
  )


def size_helps(grid: Grid, measure: Measure) -> Effect | str:
  """Finding 2: slope of held-in over size.

  The least-squares slope over log2 of the parameters, paired by base, method,
  seed and subset, over the categories that may be counted at every size; then
  the mean over bases, methods and N.
  """
  if len(grid.sizes) < 2:
    return _one_size(grid)
  values = grid.alike(SIZE).values(measure)

  def parts(means: np.ndarray) -> np.ndarray:
    return mean(_slope(means, grid.doublings), axis=-1)

  return Effect(
    'rise of held-in per doubling of the parameters',
    _paired(values, (SIZE,)),
    parts,
    (grid.bases, grid.methods),
  )


def above_base(grid: Grid, measure: Measure) -> Effect | str:
  """Finding 3, first half: held-out ÷ base − 1, mean over all merges."""
  del measure

  def parts(means: np.ndarray) -> np.ndarray:
    return mean(means, axis=(-1, -2)) - 1

  values = grid.values(held_out)
  axes = (grid.sizes, grid.bases)
  return Effect('merge ÷ base − 1, held-out', values, parts, axes)


def above_multitask(grid: Grid, measure: Measure) -> Effect | str:
  """Finding 3, second half: held-out above the multitask model's.

  (Merge − multitask model) ÷ base at the largest size, from the
  instruction-tuned base, with six experts or more; mean over methods and N.
  """
  del measure
  many = [i for i, n in enumerate(grid.ns) if n >= _MANY_EXPERTS]
  if not many:
    return f'needs N ≥ {_MANY_EXPERTS}; the largest is {grid.ns[-1]}'
  if 'instruction-tuned' not in grid.bases:
    return 'needs the instruction-tuned base'
  values = grid.values(over_multitask)[:, :, [-1], [-1]][..., many]
  if np.all(np.isnan(values)):
    return 'needs a multitask model and held-out tasks at the largest size'
  return Effect(
    '(merge − multitask model) ÷ base, held-out',
    values[:, :, None],
    lambda means: mean(means[..., 0, 0, :, :], axis=-1),
    (grid.methods,),
  )


def loss_shrinks(grid: Grid, measure: Measure) -> Effect | str:
  """Finding 4: how fast what is lost from least to most experts shrinks.

  Minus the slope over log2 of the parameters of held-in at the smallest N
  minus held-in at the largest, paired by base, method and seed, over the
  categories that may be counted at every size; then the mean over bases and
  methods. (The paper's own tables show it for the weak base alone, so look at
  the parts.)
  """
  if len(grid.sizes) < 2:
    return _one_size(grid)
  if len(grid.ns) < 2:
    return f'needs two numbers of experts; only N = {min(grid.ns)} was run'
  values = grid.alike(SIZE).values(measure)
  paired = _paired(values[..., [0, -1]], (SIZE,))

  def parts(means: np.ndarray) -> np.ndarray:
    return -_slope(means[..., 0] - means[..., 1], grid.doublings, axis=-3)

  return Effect(
    f'less lost from N = {grid.ns[0]} to {grid.ns[-1]}, per doubling',
    _with_all_seeds(paired, (SIZE, N)),
    parts,
    (grid.bases, grid.methods),
    _uncovered(grid),
  )


def spread_shrinks(grid: Grid, measure: Measure) -> Effect | str:
  """Finding 5: how fast the spread of the methods shrinks.

  Minus the slope over log2 of the parameters of best minus worst method at
  the largest N, which are those of the means over seeds; paired by base, seed
  and subset, over the methods that were run and the categories that may be
  counted at every size; mean over bases.
  """
  if len(grid.sizes) < 2:
    return _one_size(grid)
  if len(grid.methods) < 2:
    return f'needs two methods; only {", ".join(grid.methods)} was run'
  values = grid.alike(SIZE).values(measure)[..., [-1]]
  has = np.any(~np.isnan(values), axis=(SEED, SUBSET), keepdims=True)
  everywhere = np.all(has, axis=SIZE, keepdims=True)
  values = np.where(everywhere, values, np.nan)

  def parts(means: np.ndarray) -> np.ndarray:
    return -_slope(spread(means[..., 0]), grid.doublings, axis=-2)

  return Effect(
    f'fall of best − worst at N = {grid.ns[-1]}, per doubling',
    _paired(values, (SIZE, METHOD)),
    parts,
    (grid.bases,),
  )


def spread(means: np.ndarray) -> np.ndarray:
  """Best minus worst along the last axis, NaN for fewer than two."""
  missing = np.isnan(means)
  best = np.where(missing, -np.inf, means).max(axis=-1)
  worst = np.where(missing, np.inf, means).min(axis=-1)
  several = (~missing).sum(axis=-1) > 1
  return np.where(several, best, np.nan) - np.where(several, worst, 0)


def _uncovered(grid: Grid) -> str:
  """Says how many categories the fewest experts are of, if not of all.

  With few subsets, the smallest N is a mean over fewer categories than the
  largest.
  """

  def covered(n: int, seed: int) -> int:
    subsets = (
      cell.subset
      for cell in grid.cells.values()
      if (cell.n, cell.seed) == (n, seed)
    )
    return len(set(itertools.chain(*subsets)))

  first, last = grid.ns[0], grid.ns[-1]
  counts = {(covered(first, s), covered(last, s)) for s in grid.seeds}
  fewer = sorted(few for few, many in counts if 0 < few < many)
  if not fewer:
    return ''
  return (
    f'the subsets of N = {first} of one seed cover '
    f'{" or ".join(map(str, fewer))} of the '
    f'{max(many for _, many in counts)} categories that those of N = {last} do'
  )


def _one_size(grid: Grid) -> str:
  return f'needs two sizes; only {grid.sizes[0]} was run'


def _paired(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
  """Keeps the merges that were made all along some axes.

  Sizes, bases or methods without any merge are not waited for, but what has
  no counterpart at all is dropped.
  """
  has: np.ndarray = ~np.isnan(values)
  exists: np.ndarray = np.any(has, axis=(SEED, SUBSET), keepdims=True)
  complete = np.all(has | ~exists, axis=axes, keepdims=True)
  compared = np.sum(exists, axis=axes, keepdims=True) > 1
  return np.where(complete & compared, values, np.nan)


def _with_all_seeds(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
  """Keeps the seeds that have merges all along some axes."""
  has: np.ndarray = np.any(~np.isnan(values), axis=SUBSET, keepdims=True)
  exists: np.ndarray = np.any(has, axis=SEED, keepdims=True)
  complete = np.all(has | ~exists, axis=axes, keepdims=True)
  return np.where(complete, values, np.nan)


def _slope(means: np.ndarray, x: np.ndarray, axis: int = -4) -> np.ndarray:
  """Least-squares slope along an axis; NaN for fewer than two points."""
  means = np.moveaxis(means, axis, -1)
  x = np.where(np.isnan(means), np.nan, x)
  dx = x - mean(x, axis=-1)[..., None]
  dy = means - mean(means, axis=-1)[..., None]
  return mean(dx * dy, -1) / _nonzero(mean(dx * dx, -1))


def _nonzero(values: np.ndarray) -> np.ndarray:
  return np.where(values > 0, values, np.nan)


FINDERS: dict[str, Finder] = {
  '1': base_quality,
  '2': size_helps,
  '3a': above_base,
  '3b': above_multitask,
  '4': loss_shrinks,
  '5': spread_shrinks,
}
