"""Held-in over a hyperparameter, on validation and on test examples."""

from collections.abc import Iterator, Sequence
import itertools

import numpy as np

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.aggregate import Study
from experiments.scale_study.analysis.figures import style
from experiments.scale_study.analysis.figures.picture import Picture
from experiments.scale_study.analysis.sweeps import sweep_points, SweepPoint

_LINES = {'test': 'solid', 'validation': 'dashed'}
_TITLES = {'scale': 'scale λ', 'density': 'density', 'drop_rate': 'drop rate'}


def draw_all(study: Study) -> Iterator[Picture]:
  """Draws a picture for every hyperparameter and size that was swept."""
  points = sweep_points(study)
  for parameter in dict.fromkeys(point.parameter for point in points):
    for size in study.sizes:
      chosen = [
        point
        for point in points
        if (point.parameter, point.size) == (parameter, size)
      ]
      if chosen:
        yield draw(study, parameter, size, chosen)


def draw(
  study: Study, parameter: str, size: str, points: Sequence[SweepPoint]
) -> Picture:
  """Draws a row of panels a method, a column a base, a line an N and split."""
  kinds = [*dict.fromkeys((p.method, p.others) for p in points)]
  bases = [b for b in style.BASE_LOOKS if b in {p.base for p in points}]
  shades = style.shades(sorted({p.n for p in points}))
  figure, axes = style.panels(len(kinds), len(bases), sharey=True)
  for (row, kind), (column, base) in itertools.product(
    enumerate(kinds), enumerate(bases)
  ):
    panel = axes[row, column]
    style.reference(panel, 1, 'expert')
    for (n, color), (split, linestyle) in itertools.product(
      shades.items(), _LINES.items()
    ):
      curve = _curve(points, (*kind, base, n, split))
      panel.plot(
        *curve, color=color, linestyle=linestyle, marker='o', markersize=3.5
      )
    method, others = kind
    fixed = others.strip('{}').replace('"', '')
    style.title(
      panel,
      f'{names.METHODS[method]}, {names.BASES[base].lower()} base'
      + (f'\n{fixed}' if fixed else ''),
    )
    panel.set_xlabel(_TITLES.get(parameter, parameter), fontsize=style.NORMAL)
    panel.set_ylabel(names.HELD_IN, fontsize=style.NORMAL)
  style.legend(
    figure,
    [
      *(style.handle(f'N = {n}', color=color) for n, color in shades.items()),
      *(
        style.handle(split, color='black', linestyle=look)
        for split, look in _LINES.items()
      ),
    ],
    columns=6,
  )
  title = _TITLES.get(parameter, parameter)
  return Picture(
    f'sweep_{parameter}_{size}',
    f'Held-in over the {title}, size {size}',
    _reading(points, title),
    'Mean over subsets and seeds; the other hyperparameters are fixed. Merges '
    'elsewhere take what is best on validation examples of all combinations '
    'in the grids of the preset.',
    figure,
  )


def _curve(
  points: Sequence[SweepPoint], which: tuple
) -> tuple[np.ndarray, np.ndarray]:
  chosen = sorted(
    (p.x, p.value)
    for p in points
    if (p.method, p.others, p.base, p.n, p.split) == which
  )
  x, y = np.array(chosen).reshape(-1, 2).T
  return x, y


def _reading(points: Sequence[SweepPoint], title: str) -> str:
  best: dict[int, list[float]] = {}
  missed = []
  for which in dict.fromkeys((p.method, p.others, p.base, p.n) for p in points):
    x, validation = _curve(points, (*which, 'validation'))
    tested, test = _curve(points, (*which, 'test'))
    if len(x):
      chosen = x[validation.argmax()]
      best.setdefault(which[-1], []).append(chosen)
      if chosen in tested:
        missed.append(test.max() - test[tested == chosen][0])
  if not best:
    return 'The curves are of test examples alone.'
  ranges = [
    f'{min(found):g} to {max(found):g}'
    if len({*found}) > 1
    else f'{found[0]:g}'
    for found in best.values()
  ]
  chosen = names.join(
    f'{found} at N = {n}' for n, found in zip(best, ranges, strict=True)
  )
  reading = f'The {title} that is best on validation examples is {chosen}.'
  if missed:
    reading += (
      f' Over {len(missed)} curves, choosing it there misses '
      f'{names.number(float(np.mean(missed)), digits=3)} of held-in on average '
      'against the best on test examples.'
    )
  return reading
