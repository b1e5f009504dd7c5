"""Held-in by size of the model, for every number of experts."""

import numpy as np

from experiments.scale_study.analysis import measures, names, paper
from experiments.scale_study.analysis.aggregate import Grid, SIZE
from experiments.scale_study.analysis.bootstrap import Estimate, mean
from experiments.scale_study.analysis.figures import marks, style
from experiments.scale_study.analysis.figures.picture import (
  at,
  bars,
  left_out,
  part,
  Picture,
)


def draw(grid: Grid) -> Picture:
  """Draws the picture."""
  grid = grid.alike(SIZE)
  # [sizes, bases, n]
  held_in = grid.estimate(measures.held_in, lambda means: mean(means, axis=-2))
  sizes = {size: grid.results.sizes[size] for size in grid.sizes}
  looks = style.steps(sorted({*grid.ns, *paper.NS}))
  figure, axes = style.panels(2, len(grid.bases), sharey=True)
  for b, base in enumerate(grid.bases):
    ours, theirs = axes[:, b]
    for k, n in enumerate(grid.ns):
      # On a logarithmic axis a factor is a shift.
      x = np.array(list(sizes.values())) * 1.05 ** (k - len(grid.ns) / 2)
      series = part(held_in, slice(None), b, k)
      marks.line(ours, x, series, **looks[n])
    style.say_if_empty(ours, held_in.value[:, b])
    rows = [row for row in paper.ROWS if row.base == base]
    for k, n in enumerate(paper.NS):
      x = [paper.SIZES[row.size] for row in rows]
      y = [row.held_in[k] for row in rows]
      theirs.plot(x, y, **looks[n], markersize=5)
    style.size_ticks(ours, sizes)
    style.size_ticks(theirs, paper.SIZES)
    style.beside_paper(ours, theirs, base, 'expert', names.HELD_IN)
  style.legend(
    figure,
    [style.handle(f'N = {n}', **look) for n, look in looks.items()],
  )
  return Picture(
    'held_in_by_size',
    'Held-in by size of the model',
    _reading(grid, held_in),
    f'Mean over methods. {left_out(grid, ["held_in"])}{bars(grid.results)} '
    f'{paper.CITATION}.',
    figure,
  )


def _reading(grid: Grid, held_in: Estimate) -> str:
  sentences = []
  for b, base in enumerate(grid.bases):
    kept = [
      f'{names.interval(*at(held_in, i, b, -1))} at {size}'
      for i, size in enumerate(grid.sizes)
      if not np.isnan(held_in.value[i, b, -1])
    ]
    if kept:
      sentences.append(f'{names.join(kept)} from the {base} base')
  if not sentences:
    return 'No category may be counted.'
  kept = '; '.join(sentences)
  reading = f'With {grid.ns[-1]} experts, merges keep {kept}.'
  if len(grid.sizes) == 1:
    reading += ' One size was run: nothing can be said about size.'
  return reading
