"""Scores by category as bars: base, expert, multitask model and merges."""

from collections.abc import Sequence
import textwrap

from matplotlib.axes import Axes
import numpy as np

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.figures import style
from experiments.scale_study.analysis.figures.picture import Picture
from experiments.scale_study.analysis.methods import METHODS
from experiments.scale_study.analysis.scores import Table

_COLORS = {
  'base': '#d1d5db',
  'expert': '#9ca3af',
  'multitask': '#6b7280',
  **{method: look['color'] for method, look in style.METHOD_LOOKS.items()},
}
_TITLES = {
  'base': 'Base',
  'expert': 'Its expert',
  'multitask': 'Multitask model',
}
# Between held-in and held-out, in units of the place of a category, and the
# height of that in inches.
_GAP = 0.7
_HEIGHT = 0.32
_CHANCE = {'color': '#b91c1c', 'linestyle': 'dashed', 'linewidth': 1.2}


def draw(tables: Sequence[Table]) -> Picture:
  """Draws a panel for each size and base, a group of bars a category."""
  sizes = [*dict.fromkeys(table.size for table in tables)]
  bases = [*dict.fromkeys(table.base for table in tables)]
  most = max(len(table.held_in) + len(table.held_out) for table in tables)
  figure, axes = style.panels(
    len(sizes), len(bases), height=_HEIGHT * (most + 3), width=3.9
  )
  of = {(table.size, table.base): table for table in tables}
  for index, panel in np.ndenumerate(axes):
    table = of.get((sizes[index[0]], bases[index[1]]))
    if table is None:
      panel.remove()
    else:
      _draw_table(panel, table)
  bars = tables[0].columns[1:]
  style.legend(
    figure,
    [
      *(
        style.handle(
          _TITLES.get(name, names.title(name)), color=_COLORS[name], linewidth=6
        )
        for name in bars
      ),
      style.handle('Chance', **_CHANCE),
    ],
  )
  return Picture(
    'scores',
    'Scores by category',
    ' '.join(map(_reading, tables)),
    'Part of the test examples that are answered correctly, by the category, '
    'the base alone, the expert of the category, the multitask model and the '
    'merges of the most experts. Means over tasks, subsets and seeds. What has '
    'a * is not testable there, and counted in no ratio.',
    figure,
  )


def _draw_table(panel: Axes, table: Table) -> None:
  categories = [*table.held_in, *table.held_out]
  held_out = np.arange(len(categories)) >= len(table.held_in)
  places = np.arange(len(categories)) + _GAP * held_out
  chance, *bars = table.values[-1].T
  width = 0.84 / len(bars)
  for position, (name, lengths) in enumerate(
    zip(table.columns[1:], bars, strict=True)
  ):
    shift = (position - (len(bars) - 1) / 2) * width
    panel.barh(
      places + shift, np.nan_to_num(lengths), 0.9 * width, color=_COLORS[name]
    )
  panel.vlines(chance, places - 0.45, places + 0.45, **_CHANCE)
  labels = [
    textwrap.fill(name.replace('_', ' ') + '*' * (name in table.untestable), 18)
    for name in categories
  ]
  panel.set_yticks(places, labels, fontsize=style.SMALL, linespacing=1.05)
  # From above, with room for what is said of the first.
  panel.set_ylim(places[-1] + 0.6, places[0] - 1.1)
  for where, text in ((~held_out, 'held-in'), (held_out, 'held-out')):
    if where.any():
      panel.text(0.01, places[where][0] - 0.5, text, fontsize=style.SMALL)
  panel.set_xlim(0, 1.03)
  panel.set_xlabel('score', fontsize=style.NORMAL)
  style.title(
    panel,
    f'{names.title(table.base)} base, {table.size}, N = {table.n[-1]}',
  )


def _reading(table: Table) -> str:
  means = dict(zip(table.columns, table.held_in_means()[-1], strict=True))
  merges = {name: means[name] for name in means if name in METHODS}
  least, most = (
    f'{names.number(merges[name])} ({names.title(name)})'
    for name in (
      min(merges, key=merges.__getitem__),
      max(merges, key=merges.__getitem__),
    )
  )
  return (
    f'Of size {table.size}, from the {table.base} base, held-in tasks score '
    f'{names.number(means["base"])} with the base, '
    f'{names.number(means["expert"])} with their experts, and '
    f'{least} to {most} with merges of {table.n[-1]}.'
  )
