"""The merging law's numbers, by least squares; `law.py` says what it is of."""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

import numpy as np
import scipy

NAMES = ('floor', 'B', 'beta', 'A', 'gamma', 'b')
# Losses, and terms of them, in nats; sizes in units of the smallest.
_LOWER = (0.0, 0.0, 0.0, -100.0, 0.0, 0.0)
_UPPER = (100.0, 100.0, 4.0, 100.0, 4.0, 10.0)
# This near a bound is at it, or a term of this size none: the solver stays
# inside by what rounding makes it.
_NEAR = 1e-6
_STARTS = tuple(itertools.product((0.2, 1.0), (0.2, 1.0), (0.1, 2.0)))


def law(parameters, size, k) -> np.ndarray:
  """Evaluates the law.

  Args:
    parameters: `NAMES`; NaN is what no loss depends on, as a term is 0.
    size: in units of the smallest.
    k: numbers of experts.
  """
  floor, b_, beta, a, gamma, b = np.nan_to_num(parameters)
  return floor + b_ * size**-beta + a * size**-gamma / (k + b)


class Solved(NamedTuple):
  """A law with its numbers.

  Attributes:
    form: 'all sizes' or 'each size'.
    note: what else there is to know.
    parameters: by name.
    undetermined: names of parameters.
    free: how many parameters were fitted.
    predicted: loss by the law, [sizes, ks].
  """

  form: str
  note: str
  parameters: dict[str, float]
  undetermined: tuple[str, ...]
  free: int
  predicted: np.ndarray


def of_all_sizes(losses, scale, ks, fitted) -> Solved:
  """Fits one law of size and number of experts.

  Args:
    losses: [sizes, ks].
    scale: sizes in units of the smallest, [sizes].
    ks: numbers of experts merged, [ks].
    fitted: which losses are fitted, bool [sizes, ks].
  """
  free_b = np.any(fitted, axis=0).sum() >= 3
  solution, undetermined = _solve(losses, scale, ks, fitted, free_b)
  return Solved(
    'all sizes',
    '' if free_b else 'b = 0: two numbers of experts cannot tell it from A',
    dict(zip(NAMES, map(float, solution), strict=True)),
    undetermined,
    len(NAMES) if free_b else len(NAMES) - 1,
    law(solution, scale[:, None], ks),
  )


def of_each_size(losses, ks, fitted, sizes) -> Solved:
  """Fits a law of the number of experts for every size, of these names."""
  tails, floors = lines(losses, 1 / ks, fitted)
  parameters = {
    **_named([f'F({size})' for size in sizes], floors),
    **_named([f'T({size})' for size in sizes], tails),
  }
  ready = np.any(fitted, axis=1).sum()
  return Solved(
    'each size',
    f'{ready} of 3 sizes: the law of all sizes is not settled',
    parameters,
    (),
    len(parameters),
    floors[:, None] + tails[:, None] / ks,
  )


def _solve(
  losses, scale, ks, fitted, free_b
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Least squares from several starts, since the law is not convex."""
  size = np.broadcast_to(scale[:, None], losses.shape)[fitted]
  k = np.broadcast_to(ks, losses.shape)[fitted]
  seen = losses[fitted]
  free = len(NAMES) if free_b else len(NAMES) - 1
  lower, upper = np.array(_LOWER[:free]), np.array(_UPPER[:free])

  def whole(parameters):
    return np.append(parameters, np.zeros(len(NAMES) - free))

  def residuals(parameters):
    return law(whole(parameters), size, k) - seen

  def start(beta, gamma, b):
    # With the exponents given, the law is linear in the other three.
    columns = [np.ones_like(seen), size**-beta, size**-gamma / (k + b)]
    floor, b_, a = np.linalg.lstsq(np.stack(columns, 1), seen)[0]
    guess = np.array([floor, b_, beta, a, gamma, b])[:free]
    return np.clip(guess, lower + 1e-6, upper - 1e-6)

  results = [
    scipy.optimize.least_squares(
      residuals,
      start(beta, gamma, b if free_b else 0),
      bounds=(lower, upper),
      xtol=1e-14,
      ftol=1e-14,
      gtol=1e-14,
      max_nfev=5000,
    )
    for beta, gamma, b in _STARTS
  ]
  best = min(results, key=lambda result: result.cost)
  _, strengths, directions = np.linalg.svd(best.jac)
  loose = directions[strengths < 1e-6 * strengths.max()]
  at_lower, at_upper = (
    np.isclose(best.x, bound, rtol=0, atol=_NEAR) for bound in (lower, upper)
  )
  found = np.select([at_lower, at_upper], [lower, upper], best.x)
  # Of a term that is 0, where the solver left the rest is up to rounding.
  _, b_, _, a, *_ = np.abs(found) < _NEAR
  arbitrary = np.array([False, False, b_, False, a, a])[:free]
  found[arbitrary] = np.nan
  undetermined = at_lower | at_upper | arbitrary
  undetermined |= np.any(np.abs(loose) > 0.1, axis=0)
  names = np.array(NAMES[:free])[undetermined]
  return whole(found), tuple(names.tolist())


def lines(losses, x, fitted) -> tuple[np.ndarray, np.ndarray]:
  """Returns the slope and the start of a line for every size."""
  found = [
    np.polyfit(x[used], row[used], 1) if used.any() else (np.nan,) * 2
    for row, used in zip(losses, fitted, strict=True)
  ]
  slopes, starts = np.transpose(found)
  return slopes, starts


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
  pairs = zip(names, map(float, values), strict=True)
  return {name: value for name, value in pairs if not np.isnan(value)}
