"""The merging law, fitted to few experts and asked about many.

arXiv 2509.24244 finds for the expected loss over random subsets of k experts of
a model of S parameters

  E[loss | S, k] = L* + B · S^−β + A · S^−γ / (k + b).

It has six numbers. Three of them say how the floor depends on S, and fewer than
three sizes cannot tell them apart: then each size gets a law of its own,
F + T / k. Two numbers of experts cannot tell b from A: then b is 0.

The law is fitted where k ≤ 4 and asked to predict the rest, beside two plain
forecasts: that nothing changes after the last k it has seen, and that each size
goes on along a straight line in log k. As in the paper, the loss is
that on the same tasks whatever is merged. Results of before these losses were
kept have those on the tasks of the experts merged alone, which rise with k if
experts disturb each other: so A (or T) may have either sign.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools

import numpy as np

from experiments.scale_study.analysis import least_squares
from experiments.scale_study.analysis.aggregate import Grid, Results
from experiments.scale_study.analysis.measures import loss, loss_of_all

FITTED_UP_TO = 4


@dataclasses.dataclass(frozen=True)
class Point:
  """Mean loss over subsets and seeds, and what the law says of it."""

  size: str
  k: int
  seen: float
  law: float
  fitted: bool


@dataclasses.dataclass(frozen=True)
class Fit:
  """The law for one base and method.

  Attributes:
    base: of the experts.
    method: of the merges.
    form: 'all sizes', 'each size', or 'none' where it cannot be fitted.
    tasks: whose losses are fitted: 'all held-in' or 'merged'.
    note: why it is of that form, or what is doubtful about it.
    parameters: of the law by name; for 'each size', F and T by size. B and A
      are those of S in units of the smallest size. NaN is β where B is 0, and
      γ and b where A is: any number would do.
    undetermined: parameters at a bound, or that the points do not settle.
    points: every mean loss; those not `fitted` are predictions.
    r_squared: of the points fitted; NaN where they are no more than the
      parameters.
    r_squared_predicted: of the others; NaN without any.
    error: mean absolute error of the predictions.
    error_unchanged: the same for the forecast of no change after the last k.
    error_line: the same for a line in log k through the points fitted.
  """

  base: str
  method: str
  form: str
  tasks: str = 'all held-in'
  note: str = ''
  parameters: dict[str, float] = dataclasses.field(default_factory=dict)
  undetermined: tuple[str, ...] = ()
  points: tuple[Point, ...] = ()
  r_squared: float = np.nan
  r_squared_predicted: float = np.nan
  error: float = np.nan
  error_unchanged: float = np.nan
  error_line: float = np.nan

  @property
  def rises(self) -> bool:
    """Whether more experts raise the loss."""
    if self.form == 'all sizes':
      return self.parameters['A'] < 0
    tails = [v for k, v in self.parameters.items() if k.startswith('T')]
    return sum(tails) < 0

  def curve(self, size: str, scale: float, k: np.ndarray) -> np.ndarray:
    """Evaluates the fit.

    Args:
      size: name of the size.
      scale: its parameters in units of the smallest.
      k: numbers of experts.
    """
    if self.form == 'all sizes':
      numbers = [self.parameters[name] for name in least_squares.NAMES]
      return least_squares.law(numbers, scale, k)
    floor = self.parameters.get(f'F({size})', np.nan)
    return floor + self.parameters.get(f'T({size})', np.nan) / k


def fit_all(results: Results) -> list[Fit]:
  """Fits the law for every base and method, on validated merges.

  Losses are over all held-in tasks, also those of a category whose gate failed:
  a loss divides by no expert.
  """
  return list(_fits(results.grid(smallest_n=1)))


def fit(
  losses: np.ndarray,
  parameters: np.ndarray,
  ks: np.ndarray,
  *,
  sizes: tuple[str, ...],
  base: str = '',
  method: str = '',
  tasks: str = 'all held-in',
) -> Fit:
  """Fits the law to the mean losses of one base and method.

  Args:
    losses: [sizes, ks], NaN where there is none.
    parameters: of each size, [sizes], ascending.
    ks: numbers of experts merged, [ks], ascending.
    sizes: their names.
    base: for the record.
    method: for the record.
    tasks: for the record.
  """
  fitted = ~np.isnan(losses) & (ks <= FITTED_UP_TO)
  ready = np.sum(fitted, axis=1) >= 2
  if not ready.any():
    return Fit(
      base,
      method,
      'none',
      tasks,
      f'needs two numbers of experts up to {FITTED_UP_TO} at one size',
    )
  fitted &= ready[:, None]
  asked = ~np.isnan(losses) & ~fitted & ready[:, None]
  if ready.sum() >= 3:
    scale = parameters / parameters.min()
    solved = least_squares.of_all_sizes(losses, scale, ks, fitted)
  else:
    solved = least_squares.of_each_size(losses, ks, fitted, sizes)
  predicted = solved.predicted
  unchanged, straight = _plain_forecasts(losses, ks, fitted)
  return Fit(
    base,
    method,
    solved.form,
    tasks,
    solved.note,
    solved.parameters,
    solved.undetermined,
    points=tuple(
      Point(
        sizes[i], int(ks[j]), *_numbers(losses, predicted, (i, j)), bool(used)
      )
      for (i, j), used in np.ndenumerate(fitted)
      if used or asked[i, j]
    ),
    r_squared=(
      r_squared(losses[fitted], predicted[fitted])
      if fitted.sum() > solved.free
      else np.nan
    ),
    r_squared_predicted=r_squared(losses[asked], predicted[asked]),
    error=_error(losses[asked], predicted[asked]),
    error_unchanged=_error(losses[asked], unchanged[asked]),
    error_line=_error(losses[asked], straight[asked]),
  )


def r_squared(seen: np.ndarray, predicted: np.ndarray) -> float:
  """Returns the part of the variance explained; below 0 is worse than a mean.

  NaN for fewer than two values, or where they do not vary.
  """
  if len(seen) < 2 or np.ptp(seen) == 0:
    return np.nan
  left = np.sum((seen - predicted) ** 2) / np.sum((seen - seen.mean()) ** 2)
  return float(1 - left)


def which_losses(fits: Sequence[Fit]) -> str:
  """Says over which tasks the losses are that were fitted."""
  if any(fit.tasks == 'merged' for fit in fits):
    return 'Losses are over the tasks of the experts merged'
  return 'Losses are over all held-in tasks, whatever was merged'


def _fits(grid: Grid) -> Iterator[Fit]:
  losses, tasks = grid.means(loss_of_all), 'all held-in'
  if np.isnan(losses).all():
    losses, tasks = grid.means(loss), 'merged'
  parameters = np.array(
    [grid.results.sizes[size] for size in grid.sizes], float
  )
  for (i, base), (j, method) in itertools.product(
    enumerate(grid.bases), enumerate(grid.methods)
  ):
    yield fit(
      losses[:, i, j],
      parameters,
      np.array(grid.ns),
      sizes=grid.sizes,
      base=base,
      method=method,
      tasks=tasks,
    )


def _plain_forecasts(losses, ks, fitted) -> tuple[np.ndarray, np.ndarray]:
  """No change after the last k fitted, and a line in log k; [sizes, ks]."""
  last = np.where(fitted, ks, 0).argmax(axis=1)
  unchanged = losses[np.arange(len(losses)), last][:, None]
  slopes, starts = least_squares.lines(losses, np.log(ks), fitted)
  straight = starts[:, None] + slopes[:, None] * np.log(ks)
  return np.broadcast_to(unchanged, losses.shape), straight


def _numbers(losses, predicted, index) -> tuple[float, float]:
  return float(losses[index]), float(predicted[index])


def _error(seen: np.ndarray, predicted: np.ndarray) -> float:
  return float(np.abs(seen - predicted).mean()) if len(seen) else np.nan
