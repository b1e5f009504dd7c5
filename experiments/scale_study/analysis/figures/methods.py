"""The methods compared at the largest size."""

import numpy as np

from experiments.scale_study.analysis import effects, measures, names, paper
from experiments.scale_study.analysis.aggregate import BASE, Grid
from experiments.scale_study.analysis.figures import marks, style
from experiments.scale_study.analysis.figures.picture import (
  bars,
  left_out,
  part,
  Picture,
)


def draw(grid: Grid) -> Picture:
  """Draws held-in and held-out, a row of panels a base, a line a method."""
  grid = grid.alike(BASE)
  columns = (
    (measures.held_in, names.HELD_IN, 'expert', paper.METHODS_HELD_IN),
    (measures.held_out, names.HELD_OUT, 'base', paper.METHODS_HELD_OUT),
  )[: 1 + grid.has_held_out]
  size = grid.sizes[-1]
  figure, axes = style.panels(
    len(grid.bases) + 1, len(columns), last_height=1.7, sharey='col'
  )
  for column, (measure, label, reference, ends) in enumerate(columns):
    title = label.partition(':')[0]
    merged = part(grid.estimate(measure), -1)
    for b, base in enumerate(grid.bases):
      panel = axes[b, column]
      series = {m: part(merged, b, j) for j, m in enumerate(grid.methods)}
      marks.lines(panel, grid.ns, series, style.METHOD_LOOKS)
      style.count_ticks(panel, grid.ns)
      style.title(panel, f'{names.title(base)} base, {size}: {title}')
    panel = axes[-1, column]
    panel.plot([8, 8], ends, color='black', marker='_', markersize=16)
    panel.annotate(
      f'all four methods: {" to ".join(sorted({*map(names.number, ends)}))}',
      (8, float(np.mean(ends))),
      xytext=(-14, 0),
      textcoords='offset points',
      ha='right',
      va='center',
      fontsize=style.SMALL,
    )
    style.count_ticks(panel, paper.NS)
    style.title(panel, f'The paper, 64B: {title}\ninstruction-tuned base')
    for panel in axes[:, column]:
      style.reference(panel, 1, reference)
      panel.set_ylabel(label, fontsize=style.NORMAL)
  style.legend(figure, style.method_handles(grid.methods))
  return Picture(
    'methods_compared',
    f'Methods compared at the largest size, {size}',
    _reading(grid),
    f'{left_out(grid, sizes=[size])}{bars(grid.results)} The paper: from the '
    'instruction-tuned base, N = 8.',
    figure,
  )


def _reading(grid: Grid) -> str:
  sentences = []
  for b, base in enumerate(grid.bases):
    kept = grid.means(measures.held_in)[-1, b, :, -1]
    spread = float(effects.spread(kept))
    if np.isnan(spread):
      continue
    best, worst = (
      f'{names.title(grid.methods[int(j)])} ({names.number(kept[int(j)])})'
      for j in (np.nanargmax(kept), np.nanargmin(kept))
    )
    sentences.append(
      f'From the {base} base, with {grid.ns[-1]} experts, {best} keeps most of '
      f'the experts’ scores and {worst} least, {names.number(spread)} apart.'
    )
  return ' '.join(sentences) or 'There are no two methods to compare.'
