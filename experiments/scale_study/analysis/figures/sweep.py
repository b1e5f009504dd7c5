"""Held-in over a hyperparameter, on validation and on test examples."""

from collections.abc import Iterator, Sequence
import itertools
import json

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
  """Draws a picture for every hyperparameter swept, of the most experts."""
  points = sweep_points(results)
  most = max((point.n for point in points), default=0)
  points = [point for point in points if point.n == most]
  for parameter in dict.fromkeys(point.parameter for point in points):
    chosen = [point for point in points if point.parameter == parameter]
    yield draw(results, parameter, chosen)


def draw(
  results: Results, parameter: str, points: Sequence[SweepPoint]
) -> Picture:
  """Draws a row of panels a method, a column a base, a line a size and split.

  Args:
    results: what the points are of.
    parameter: that was swept.
    points: of one number of experts.
  """
  kinds = [*dict.fromkeys((p.method, p.others) for p in points)]
  bases = [b for b in style.BASE_LOOKS if b in {p.base for p in points}]
  sizes = [s for s in results.sizes if s in {p.size for p in points}]
  looks = style.steps(sizes)
  title = _TITLES.get(parameter, parameter)
  figure, axes = style.panels(len(kinds), len(bases), sharey=True)
  for (row, kind), (column, base) in itertools.product(
    enumerate(kinds), enumerate(bases)
  ):
    panel = axes[row, column]
    style.reference(panel, 1, 'expert')
    # A little apart, so that bars do not hide each other.
    step = 0.012 * np.ptp([p.x for p in points if (p.method, p.others) == kind])
    for place, (size, look) in enumerate(looks.items()):
      shift = step * (place - (len(looks) - 1) / 2)
      tested, validated = (
        _curve(points, (*kind, base, size), split) for split in _LINES
      )
      x = np.array([point.x for point in tested])
      marks.line(panel, x + shift, _values(tested), **look)
      panel.plot(
        [point.x + shift for point in validated],
        [point.value for point in validated],
        color=look['color'],
        linestyle=_LINES['validation'],
        linewidth=1.2,
      )
    style.title(panel, f'{_kind(*kind)},\n{names.title(base).lower()} base')
    panel.set_xlabel(title, fontsize=style.NORMAL)
    panel.set_ylabel(names.HELD_IN, fontsize=style.NORMAL)
  style.legend(
    figure,
    [
      *(
        style.handle(f'{size} ({names.amount(results.sizes[size])})', **look)
        for size, look in looks.items()
      ),
      *(
        style.handle(split, color='black', linestyle=look)
        for split, look in _LINES.items()
      ),
    ],
    columns=6,
  )
  grid = results.grid().alike(BASE)
  return Picture(
    f'sweep_{parameter}',
    f'Held-in over the {title}, N = {points[0].n}',
    _reading(points, title),
    'Mean over subsets and seeds; the other hyperparameters are fixed. Merges '
    'elsewhere take what is best on validation examples of all combinations '
    f'in the grids of the preset. {left_out(grid, ["held_in"], sizes)}A curve '
    'leaves out besides in what its own few examples show no gain: of a size, '
    'those of both bases count the same categories, those of another perhaps '
    f'others. Dashed curves have no bars. {bars(results)}',
    figure,
  )


def _curve(
  points: Sequence[SweepPoint], which: tuple, split: str
) -> list[SweepPoint]:
  """Returns the points of a method, others, base and size, in order."""
  chosen = [
    p
    for p in points
    if (p.method, p.others, p.base, p.size, p.split) == (*which, split)
  ]
  return sorted(chosen, key=lambda point: point.x)


def _values(curve: Sequence[SweepPoint]) -> Estimate:
  bounds = np.array([(p.value, p.low, p.high) for p in curve])
  return Estimate(*bounds.reshape(-1, 3).T)


def _kind(method: str, others: str) -> str:
  """Names a method and what was not swept: Dare-TIES with scale 0.6."""
  fixed = [
    f'{name.replace("_", " ")} {value:g}'
    for name, value in json.loads(others).items()
  ]
  return names.title(method) + (f' with {names.join(fixed)}' if fixed else '')


def _reading(points: Sequence[SweepPoint], title: str) -> str:
  best: dict[str, dict[str, list[float]]] = {}
  missed = []
  for which in dict.fromkeys(
    (p.method, p.others, p.base, p.size) for p in points
  ):
    method, others, _, size = which
    kind = _kind(method, others)
    validated = _by_seed(_curve(points, which, 'validation'))
    tested = _by_seed(_curve(points, which, 'test'))
    for seed, kept in validated.items():
      chosen = max(kept, key=kept.__getitem__)
      best.setdefault(kind, {}).setdefault(size, []).append(chosen)
      test = tested.get(seed, {})
      if chosen in test:
        missed.append(max(test.values()) - test[chosen])
  if not best:
    return 'The curves are of test examples alone.'
  chosen = '; '.join(
    names.join(f'{_range(found)} at {size}' for size, found in of.items())
    + f' for {kind}'
    for kind, of in best.items()
  )
  reading = (
    f'With {points[0].n} experts, the {title} that is best on validation '
    f'examples, by base and seed, is {chosen}.'
  )
  if missed:
    reading += (
      ' Choosing it there for each size, base and seed misses '
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
