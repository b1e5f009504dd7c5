"""How far a merge moves from its base, beside what it keeps."""

import itertools

import numpy as np
import scipy

from experiments.scale_study.analysis import measures, names
from experiments.scale_study.analysis.aggregate import BASE, Grid, SIZE
from experiments.scale_study.analysis.bootstrap import mean
from experiments.scale_study.analysis.figures import style
from experiments.scale_study.analysis.figures.picture import left_out, Picture


def draw(grid: Grid) -> Picture:
  """Draws a row of panels a size, a column a base, a path a method."""
  grid = grid.alike(SIZE, BASE)
  drift, held_in = (
    grid.means(measure) for measure in (measures.drift, measures.held_in)
  )
  single = grid.values(measures.drift), grid.values(measures.held_in)
  figure, axes = style.panels(len(grid.sizes), len(grid.bases), sharey=True)
  for (i, size), (b, base) in itertools.product(
    enumerate(grid.sizes), enumerate(grid.bases)
  ):
    panel = axes[i, b]
    style.reference(panel, 1, 'expert')
    for j, method in enumerate(grid.methods):
      look = style.METHOD_LOOKS[method]
      x, y = (values[:, :, i, b, j].ravel() for values in single)
      panel.scatter(x, y, s=7, alpha=0.25, linewidths=0, **look)
      x, y = drift[i, b, j], held_in[i, b, j]
      panel.plot(x, y, markersize=5.5, linewidth=1.2, **look)
      panel.plot(x[:1], y[:1], markersize=5.5, markerfacecolor='white', **look)
    style.say_if_empty(panel, held_in[i, b])
    style.title(panel, f'{names.title(base)} base, {size}')
    panel.set_xlabel('drift: ‖merge − base‖ ÷ ‖base‖', fontsize=style.NORMAL)
    panel.set_ylabel(names.HELD_IN, fontsize=style.NORMAL)
  look = {'color': style.REFERENCE, 'marker': 'o', 'linestyle': 'none'}
  first = style.handle(f'N = {grid.ns[0]}', **look, markerfacecolor='white')
  handles = [*style.method_handles(grid.methods), first]
  style.legend(figure, handles, columns=5)
  return Picture(
    'drift',
    'Drift from the base beside held-in',
    _reading(grid, drift, held_in),
    'Small marks are merges, large ones their means for each N, from the open '
    f'mark of N = {grid.ns[0]} to N = {grid.ns[-1]}. '
    f'{left_out(grid, ["held_in"])}'.strip(),
    figure,
  )


def _reading(grid: Grid, drift: np.ndarray, held_in: np.ndarray) -> str:
  by_method = mean(drift, axis=(0, 1, 3))
  nearest, furthest = (
    f'{names.title(grid.methods[int(j)])} '
    f'({names.number(by_method[int(j)], digits=3)})'
    for j in (np.nanargmin(by_method), np.nanargmax(by_method))
  )
  reading = f'{furthest} moves furthest from the base, {nearest} least. '
  found = _correlations(drift, held_in)
  if not found:
    return reading.strip()
  reading += (
    'Over methods and N, the rank correlation of drift and held-in is '
    f'{found}, by size and base'
  )
  # One without hyperparameters may be both the nearest and the worst.
  tuned = {cell.method for cell in grid.cells.values() if cell.hyperparameters}
  kept = [j for j, method in enumerate(grid.methods) if method in tuned]
  among = _correlations(drift[:, :, kept], held_in[:, :, kept])
  if len(kept) < len(grid.methods) and among:
    reading += f'; over the methods that have hyperparameters alone {among}'
  return f'{reading}.'


def _correlations(drift: np.ndarray, held_in: np.ndarray) -> str:
  """Ranges over sizes and bases; empty where there is too little to rank."""
  together = ~np.isnan(drift) & ~np.isnan(held_in)
  found = []
  for index in np.ndindex(drift.shape[:2]):
    x, y = (values[index][together[index]] for values in (drift, held_in))
    if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
      found.append(float(np.asarray(scipy.stats.spearmanr(x, y))[0]))
  if not found:
    return ''
  ends = dict.fromkeys((min(found), max(found)))
  return ' to '.join(map(names.number, ends))
