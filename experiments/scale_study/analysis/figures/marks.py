"""What is drawn into panels: series with bars, levels, the paper's numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
import numpy as np

from experiments.scale_study.analysis import paper
from experiments.scale_study.analysis.bootstrap import Estimate
from experiments.scale_study.analysis.figures import style
from experiments.scale_study.analysis.figures.picture import part

# How far from its point a bar makes room for itself. That of two subsets may be
# ten times as long as all that is drawn.
_ROOM = 1.0


def line(
  axes: Axes, x: Sequence[float] | np.ndarray, series: Estimate, **look: Any
) -> None:
  """Draws a series with its intervals as bars; long ones leave the panel.

  Args:
    axes: the panel.
    x: of the series; points that are NaN are left out.
    series: its estimates, [x].
    **look: color, marker and the like.
  """
  present = ~np.isnan(series.value)
  x = np.asarray(x, float)[present]
  value, low, high = part(series, present)
  axes.plot(x, value, **{'markersize': 5, 'linewidth': 1.5} | look)
  bars = LineCollection(
    list(np.stack([np.column_stack([x, end]) for end in (low, high)], axis=1)),
    colors=look['color'],
    linewidths=1.3,
    alpha=0.7,
  )
  axes.add_collection(bars, autolim=False)
  for ends in (np.maximum(low, value - _ROOM), np.minimum(high, value + _ROOM)):
    axes.update_datalim(np.column_stack([x, ends])[~np.isnan(ends)])


def lines(
  axes: Axes,
  x: Sequence[float],
  series: Mapping[str, Estimate],
  looks: Mapping[str, dict[str, Any]],
) -> None:
  """Draws several series a little apart, so that bars do not hide each other.

  Args:
    axes: the panel.
    x: of all series.
    series: by name.
    looks: by name.
  """
  middle = (len(series) - 1) / 2
  for position, (name, values) in enumerate(series.items()):
    shifted = np.asarray(x, float) + 0.13 * (position - middle)
    line(axes, shifted, values, **looks[name])
  style.say_if_empty(axes, [values.value for values in series.values()])


def level(axes: Axes, y: float, **look: Any) -> None:
  """Draws a horizontal line with a mark at its end, unless there is none.

  Args:
    axes: the panel.
    y: of the line; NaN if there is no such level.
    **look: color, line style and marker.
  """
  if not np.isnan(y):
    axes.axhline(
      y,
      **{'linewidth': 1.2, 'markersize': 5} | look,
      markerfacecolor='white',
      markevery=[1],
      clip_on=False,
      zorder=1,
    )


def dumbbells(
  axes: Axes, rows: Sequence[tuple[str, Mapping[str, tuple[float, ...]]]]
) -> None:
  """Draws a row of marks, one a base, joined by a line, and their intervals.

  These lie above each other, so that none hides another or a mark.

  Args:
    axes: the panel.
    rows: from above, a label and by base (value, low, high).
  """
  for y, (_, estimates) in enumerate(reversed(rows)):
    values = [value for value, *_ in estimates.values()]
    axes.plot(values, [y] * len(values), color='#9ca3af', linewidth=1.2)
    middle = (len(estimates) - 1) / 2
    for place, (base, (value, low, high)) in enumerate(estimates.items()):
      look = style.BASE_LOOKS[base]
      axes.plot(value, y, linestyle='none', markersize=7, **look)
      axes.hlines(
        y + 0.3 * (middle - place),
        low,
        high,
        colors=look['color'],
        linewidth=3.5,
        alpha=0.4,
        zorder=1,
      )
  style.say_if_empty(
    axes, [value for _, row in rows for value, *_ in row.values()]
  )
  axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)])
  axes.set_ylim(-0.7, len(rows) - 0.3)


def paper_lines(axes: Axes, measure: str, bases: Sequence[str]) -> None:
  """Draws what the paper reports: N = 2, N = 8, multitask; a line a size.

  Args:
    axes: the panel; names of sizes are placed by its limits, so it comes last
      of those that share them.
    measure: 'held_in' or 'held_out'.
    bases: whose lines.
  """
  rows = [row for row in paper.ROWS if row.base in bases]
  last = paper.NS[-1]
  place = last + 2.6
  ends = [getattr(row, f'{measure}_multitask') for row in rows]
  for row, end in zip(rows, ends, strict=True):
    look = {'markersize': 5, **style.BASE_LOOKS[row.base]}
    merged = getattr(row, measure)
    axes.plot(paper.NS, merged, **look)
    axes.plot((last, place), (merged[-1], end), linestyle=':', **look)
    axes.plot(place, end, **look, markerfacecolor='white')
  style.count_ticks(axes, paper.NS)
  axes.set_xticks([*paper.NS, place], [*map(str, paper.NS), 'multitask'])
  # Room for the name of the reference.
  axes.set_xlim(min(paper.NS) - 2, place + 1.9)
  low, high = axes.get_ylim()
  gap = 0.08 * (high - low)
  heights = apart(ends, gap)
  # Above the panel is its title.
  heights -= max(heights.max() + gap / 2 - high, 0)
  for row, end, y in zip(rows, ends, heights, strict=True):
    axes.annotate(
      row.size,
      (place + 0.2, end),
      xytext=(place + 0.8, y),
      va='center',
      fontsize=style.SMALL,
      color=style.BASE_LOOKS[row.base]['color'],
      arrowprops={'arrowstyle': '-', 'color': '#d1d5db', 'linewidth': 0.8},
      bbox={'facecolor': 'white', 'linewidth': 0, 'pad': 0.3},
    )


def apart(values: Sequence[float], gap: float) -> np.ndarray:
  """Moves values until neighbours are a gap apart, keeping their order."""
  order = np.argsort(values, kind='stable')
  moved = np.array(values, float)[order]
  for _ in range(100):
    close = gap - np.diff(moved)
    push = np.where(close > 1e-9, close / 2, 0)
    moved[:-1] -= push
    moved[1:] += push
  result = np.empty_like(moved)
  result[order] = moved
  return result
