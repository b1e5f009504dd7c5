"""Held-in over a hyperparameter, on validation and on test examples."""

from collections.abc import Iterator, Sequence
import itertools

import numpy as np

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.aggregate import BASE, Results
from experiments.scale_study.analysis.bootstrap import Estimate
from experiments.scale_study.analysis.figures import marks, style
from experiments.scale_study.analysis.figures.picture import (
  bars,
  left_out,
  Picture,
)
from experiments.scale_study.analysis.sweeps import sweep_points, SweepPoint

_LINES = {'test': 'solid', 'validation': 'dashed'}
_TITLES = {'scale': 'scale λ', 'density': 'density', 'drop_rate': 'drop rate'}


def draw_all(results: Results) -> Iterator[Picture]:
  """Draws a picture for every hyperparameter and size that was swept."""
  points = sweep_points(results)
  for parameter in dict.fromkeys(point.parameter for point in points):
    for size in results.sizes:
      chosen = [
        point
        for point in points
        if (point.parameter, point.size) == (parameter, size)
      ]
      if chosen:
        yield draw(results, parameter, size, chosen)


def draw(
  results: Results, parameter: str, size: str, points: Sequence[SweepPoint]
) -> Picture:
  """Draws a row of panels a method, a column a base, a line an N and split."""
  kinds = [*dict.fromkeys((p.method, p.others) for p in points)]
  bases = [b for b in style.BASE_LOOKS if b in {p.base for p in points}]
  looks = style.steps(sorted({p.n for p in points}))
  title = _TITLES.get(parameter, parameter)
  figure, axes = style.panels(len(kinds), len(bases), sharey=True)
  for (row, kind), (column, base) in itertools.product(
    enumerate(kinds), enumerate(bases)
  ):
    panel = axes[row, column]
    style.reference(panel, 1, 'expert')
    for (n, look), (split, linestyle) in itertools.product(
      looks.items(), _LINES.items()
    ):
      curve = _curve(points, (*kind, base, n), split)
      x = np.array([point.x for point in curve])
      if split == 'validation' and len(x):
        # A little apart, so that bars do not hide each other.
        x = x + 0.012 * np.ptp(x)
      marks.line(panel, x, _values(curve), **look, linestyle=linestyle)
    method, others = kind
    fixed = others.strip('{}').replace('"', '')
    style.title(
      panel,
      f'{names.title(method)}, {names.title(base).lower()} base'
      + (f'\n{fixed}' if fixed else ''),
    )
    panel.set_xlabel(title, fontsize=style.NORMAL)
    panel.set_ylabel(names.HELD_IN, fontsize=style.NORMAL)
  style.legend(
    figure,
    [
      *(style.handle(f'N = {n}', **look) for n, look in looks.items()),
      *(
        style.handle(split, color='black', linestyle=look)
        for split, look in _LINES.items()
      ),
    ],
    columns=6,
  )
  grid = results.grid().alike(BASE)
  return Picture(
    f'sweep_{parameter}_{size}',
    f'Held-in over the {title}, size {size}',
    _reading(points, title),
    'Mean over subsets and seeds; the other hyperparameters are fixed. Merges '
    'elsewhere take what is best on validation examples of all combinations '
    f'in the grids of the preset. {left_out(grid, ["held_in"], [size])}A curve '
    'leaves out besides in what its own few examples show no gain. '
    f'{bars(results)}',
    figure,
  )


def _curve(
  points: Sequence[SweepPoint], which: tuple, split: str
) -> list[SweepPoint]:
  """Returns the points of a method, others, base and N, in order."""
  chosen = [
    p
    for p in points
    if (p.method, p.others, p.base, p.n, p.split) == (*which, split)
  ]
  return sorted(chosen, key=lambda point: point.x)


def _values(curve: Sequence[SweepPoint]) -> Estimate:
  bounds = np.array([(p.value, p.low, p.high) for p in curve])
  return Estimate(*bounds.reshape(-1, 3).T)


def _reading(points: Sequence[SweepPoint], title: str) -> str:
  best: dict[tuple[str, int], list[float]] = {}
  missed = []
  for which in dict.fromkeys((p.method, p.others, p.base, p.n) for p in points):
    method, _, _, n = which
    validated = _by_seed(_curve(points, which, 'validation'))
    tested = _by_seed(_curve(points, which, 'test'))
    for seed, kept in validated.items():
      chosen = max(kept, key=kept.__getitem__)
      best.setdefault((method, n), []).append(chosen)
      test = tested.get(seed, {})
      if chosen in test:
        missed.append(max(test.values()) - test[chosen])
  if not best:
    return 'The curves are of test examples alone.'
  chosen = names.join(
    f'{_range(found)} with {names.title(method)} at N = {n}'
    for (method, n), found in best.items()
  )
  reading = (
    f'The {title} that is best on validation examples, by base and seed, is '
    f'{chosen}.'
  )
  if missed:
    reading += (
      f' Choosing it there for each base and seed misses '
      f'{names.number(float(np.mean(missed)), digits=3)} of held-in on average '
      'against the best on test examples.'
    )
  return reading


def _by_seed(curve: Sequence[SweepPoint]) -> dict[int, dict[float, float]]:
  """Returns held-in by seed and place."""
  found: dict[int, dict[float, float]] = {}
  for point in curve:
    for seed, value in point.by_seed.items():
      found.setdefault(seed, {})[point.x] = value
  return found


def _range(values: Sequence[float]) -> str:
  low, high = min(values), max(values)
  return f'{low:g}' if low == high else f'{low:g} to {high:g}'
