"""The methods compared at the largest size."""

from matplotlib.axes import Axes
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
  figure, axes = style.panels(len(grid.bases) + 1, len(columns), sharey='col')
  for column, (measure, label, reference, ends) in enumerate(columns):
    title = label.partition(':')[0]
    merged = part(grid.estimate(measure), -1)
    for b, base in enumerate(grid.bases):
      panel = axes[b, column]
      series = {m: part(merged, b, j) for j, m in enumerate(grid.methods)}
      marks.lines(panel, grid.ns, series, style.METHOD_LOOKS)
      style.count_ticks(panel, grid.ns)
      style.title(panel, f'{names.title(base)} base, {size}: {title}')
    _draw_paper(axes[-1, column], title.replace('-', '_'), ends)
    style.title(axes[-1, column], f'The paper, 64B: {title}')
    for panel in axes[:, column]:
      style.reference(panel, 1, reference)
      panel.set_ylabel(label, fontsize=style.NORMAL)
  style.legend(figure, style.method_handles(grid.methods))
  return Picture(
    'methods_compared',
    f'Methods compared at the largest size, {size}',
    _reading(grid),
    f'{left_out(grid, sizes=[size])}{bars(grid.results)} The paper’s lines are '
    'of task arithmetic; its other methods are known from the '
    'instruction-tuned base at N = 8 alone.',
    figure,
  )


def _draw_paper(panel: Axes, measure: str, ends: tuple[float, float]) -> None:
  """Draws task arithmetic from both bases, and all methods where known.

  Args:
    panel: for the paper.
    measure: 'held_in' or 'held_out'.
    ends: the least and the most of all methods.
  """
  for row in paper.ROWS:
    if row.size == '64B':
      merged = getattr(row, measure)
      look = style.METHOD_LOOKS['task_arithmetic']
      panel.plot(paper.NS, merged, **look, markersize=5)
      panel.annotate(
        names.title(row.base),
        (paper.NS[0], merged[0]),
        # On the side that the line leaves.
        xytext=(6, -7 if merged[1] > merged[0] else 7),
        textcoords='offset points',
        va='center',
        fontsize=style.SMALL,
        bbox=style.BACKING,
        zorder=1.5,  # between the reference and the lines
      )
  last = paper.NS[-1]
  # Away from the reference.
  side = 1 if ends[0] > 1 else -1
  panel.plot([last, last], ends, color='black', marker='_', markersize=16)
  panel.annotate(
    f'all four: {" to ".join(sorted({*map(names.number, ends)}))}',
    (last, float(np.mean(ends))),
    xytext=(12, 10 * side),
    textcoords='offset points',
    ha='right',
    va='center',
    fontsize=style.SMALL,
    bbox=style.BACKING,
    zorder=1.5,
  )
  style.count_ticks(panel, paper.NS)


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
