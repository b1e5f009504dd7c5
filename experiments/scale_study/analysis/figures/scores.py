"""Scores by category as bars: base, expert, multitask model and merges."""

from collections.abc import Sequence

from matplotlib.axes import Axes
import numpy as np

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.figures import style
from experiments.scale_study.analysis.figures.picture import Picture
from experiments.scale_study.analysis.methods import METHODS
from experiments.scale_study.analysis.scores import Table

_COLORS = {
  'base': '#d1d5db',
  'expert': '#6b7280',
  'multitask': '#374151',
  **{method: look['color'] for method, look in style.METHOD_LOOKS.items()},
}
_TITLES = {
  'base': 'Base',
  'expert': 'Its expert',
  'multitask': 'Multitask model',
}
# Between held-in and held-out, in units of the place of a category.
_GAP = 0.6
_CHANCE = {'color': '#b91c1c', 'linestyle': 'dashed', 'linewidth': 1.2}


def draw(tables: Sequence[Table]) -> Picture:
  """Draws a panel for each size and base, a group of bars a category."""
  figure, axes = style.panels(len(tables), 1, width=8.5, sharey=True)
  for panel, table in zip(axes[:, 0], tables, strict=True):
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
  for position, (name, heights) in enumerate(
    zip(table.columns[1:], bars, strict=True)
  ):
    shift = (position - (len(bars) - 1) / 2) * width
    panel.bar(
      places + shift, np.nan_to_num(heights), 0.9 * width, color=_COLORS[name]
    )
  panel.hlines(chance, places - 0.45, places + 0.45, **_CHANCE)
  labels = [
    name.replace('_', '\n') + '*' * (name in table.untestable)
    for name in categories
  ]
  panel.set_xticks(places, labels, fontsize=style.SMALL)
  panel.set_xlim(places[0] - 0.6, places[-1] + 0.6)
  for where, text in ((~held_out, 'held-in'), (held_out, 'held-out')):
    if where.any():
      panel.text(places[where][0] - 0.45, 1.06, text, fontsize=style.SMALL)
  panel.set_ylim(0, 1.15)
  panel.set_ylabel('score', fontsize=style.NORMAL)
  style.title(
    panel,
    f'{names.title(table.base)} base, {table.size}: N = {table.n[-1]} experts',
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
