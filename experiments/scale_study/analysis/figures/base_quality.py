"""Held-in by quality of the base: pairs of marks at the most experts."""

import numpy as np

from experiments.scale_study.analysis import (
  effects,
  measures,
  names,
  paper,
  verdicts,
)
from experiments.scale_study.analysis.aggregate import BASE, Grid
from experiments.scale_study.analysis.figures import marks, style
from experiments.scale_study.analysis.figures.picture import (
  at,
  bars,
  left_out,
  Picture,
)


def draw(grid: Grid) -> Picture:
  """Draws the picture."""
  grid = grid.alike(BASE)
  n = grid.ns[-1]
  held_in = grid.estimate(measures.held_in, lambda means: means[..., -1])
  figure, (panels,) = style.panels(1, 2, height=3.6)
  ours = [
    (
      f'{names.title(method)}, {size}',
      {base: at(held_in, i, b, j) for b, base in enumerate(grid.bases)},
    )
    for i, size in enumerate(grid.sizes)
    for j, method in enumerate(grid.methods)
  ]
  theirs = [
    (
      size,
      {
        row.base: (row.held_in[-1], np.nan, np.nan)
        for row in paper.ROWS
        if row.size == size
      },
    )
    for size in paper.SIZES
  ]
  titles = (f'This study, N = {n}', f'The paper, N = {paper.NS[-1]}')
  panels[0].sharex(panels[1])
  for panel, rows, title in zip(panels, (ours, theirs), titles, strict=True):
    marks.dumbbells(panel, rows)
    style.title(panel, title)
    panel.axvline(1, color=style.REFERENCE, linewidth=1, zorder=1)
    panel.set_xlabel(names.HELD_IN, fontsize=style.NORMAL)
  style.legend(figure, style.base_handles(list(style.BASE_LOOKS)))
  return Picture(
    'held_in_by_base',
    'Held-in by quality of the base',
    _reading(grid),
    'A row is a method and size, in the paper’s panel a size; a mark is a '
    'base. Both marks of a row count the same categories, rows of another size '
    'perhaps others; the vertical line at 1 is as good as the experts. '
    f'{left_out(grid, ["held_in"])}{bars(grid.results)} '
    f'{paper.CITATION}.',
    figure,
  )


def _reading(grid: Grid) -> str:
  effect = effects.base_quality(grid, measures.held_in)
  verdict = verdicts.judge('1', effect, 'validated', 'ratio')
  compared = [p for p in verdict.parts if not np.isnan(p.effect)]
  if not compared:
    return f'The two bases cannot be compared: {verdict.reason}.'
  ahead = sum(part.effect > 0 for part in compared)
  gain = names.interval(verdict.effect, verdict.low, verdict.high, signed=True)
  return (
    f'With {grid.ns[-1]} experts, merges from the instruction-tuned base keep '
    f'more of the expert’s score in {ahead} of {len(compared)} pairs of size '
    f'and method. The mean difference is {gain}.'
  )
