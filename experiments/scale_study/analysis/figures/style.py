"""How everything is drawn, the same in every figure.

Colours are those of Okabe and Ito, which people with colour-blindness can tell
apart; a marker, a line style or a label always says the same again.
"""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any, Literal

from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np
from numpy.typing import ArrayLike

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.bases import BASES
from experiments.scale_study.analysis.methods import METHODS

METHOD_LOOKS: Mapping[str, dict[str, Any]] = {
  name: {'color': look.color, 'marker': look.marker}
  for name, look in METHODS.items()
}
BASE_LOOKS: Mapping[str, dict[str, Any]] = {
  name: {'color': look.color, 'marker': look.marker}
  for name, look in BASES.items()
}
REFERENCE = '#6b7280'

SMALL, NORMAL = 8, 9
# Behind words that a line may cross.
BACKING = {'facecolor': 'white', 'linewidth': 0, 'pad': 0.5, 'alpha': 0.8}


def panels(
  rows: int,
  columns: int,
  *,
  height: float = 2.9,
  last_height: float | None = None,
  width: float = 3.7,
  sharey: bool | Literal['row', 'col'] = False,
) -> tuple[Figure, np.ndarray]:
  """Makes a figure of [rows, columns] panels.

  Args:
    rows: of panels.
    columns: of panels.
    height: of a row, in inches.
    last_height: of the last row, where it is another.
    width: of a column; one alone is a little wider.
    sharey: as in `Figure.subplots`.
  """
  heights = [height] * (rows - 1) + [last_height or height]
  total = width * columns if columns > 1 else 1.35 * width
  figure = Figure(figsize=(total, sum(heights) + 0.4), layout='constrained')
  axes = figure.subplots(
    rows, columns, squeeze=False, sharey=sharey, height_ratios=heights
  )
  for panel in axes.flat:
    panel.spines[['top', 'right']].set_visible(False)
    panel.grid(color='#e5e7eb', linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=NORMAL, labelleft=True, labelbottom=True)
  return figure, axes


def title(axes: Axes, text: str) -> None:
  """Names a panel."""
  axes.set_title(text, loc='left', fontsize=10, fontweight='bold')


def reference(axes: Axes, y: float, text: str) -> None:
  """Draws a level to compare with, named above its left end."""
  axes.axhline(y, color=REFERENCE, linewidth=1, zorder=1)
  axes.margins(y=0.09)  # room for the name at an end
  axes.annotate(
    text,
    (0, y),
    xycoords=('axes fraction', 'data'),
    xytext=(3, 1.5),
    textcoords='offset points',
    va='bottom',
    fontsize=SMALL,
    color=REFERENCE,
    bbox=BACKING,
  )


def say_if_empty(axes: Axes, values: ArrayLike) -> None:
  """Says why a panel is empty, where no category may be counted in it.

  Args:
    axes: the panel.
    values: everything that is drawn there; NaN is not.
  """
  if np.isnan(values).all():
    axes.text(
      0.5,
      0.4,
      'no category may be counted',
      transform=axes.transAxes,
      ha='center',
      fontsize=SMALL,
      color=REFERENCE,
    )


def beside_paper(
  ours: Axes, theirs: Axes, base: str, equal: str, label: str
) -> None:
  """Names a panel of this study and one of the paper, of the same base.

  Args:
    ours: the panel of this study.
    theirs: the panel of the paper.
    base: of the experts.
    equal: what a merge is as good as where its ratio is 1.
    label: of the ratio.
  """
  for panel, whose in ((ours, 'This study'), (theirs, 'The paper')):
    title(panel, f'{whose}: {names.title(base).lower()} base')
    reference(panel, 1, equal)
    panel.set_ylabel(label, fontsize=NORMAL)


def count_ticks(axes: Axes, ns: Sequence[int]) -> None:
  """Marks the numbers of experts along x."""
  axes.set_xticks(list(ns), [str(n) for n in ns])
  axes.set_xlim(min(ns) - 1.3, max(ns) + 0.8)
  axes.set_xlabel('experts merged, N', fontsize=NORMAL)


def size_ticks(axes: Axes, sizes: Mapping[str, float]) -> None:
  """Marks the sizes along a logarithmic x."""
  values = list(sizes.values())
  written = {name: names.amount(value) for name, value in sizes.items()}
  axes.set_xscale('log')
  axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
  axes.set_xticks(
    values,
    [
      name if name == value else f'{name}\n{value}'
      for name, value in written.items()
    ],
  )
  axes.set_xticks([], minor=True)
  axes.set_xlabel('parameters', fontsize=NORMAL)


def legend(figure: Figure, handles: Sequence[Any], columns: int = 4) -> None:
  """Puts one legend under all panels, narrower where there is one column."""
  room = columns if figure.get_figwidth() > 6 else 3
  figure.legend(
    handles=list(handles),
    loc='outside lower center',
    ncols=min(room, len(handles)),
    frameon=False,
    fontsize=NORMAL,
  )


def handle(label: str, **look: Any) -> Line2D:
  """Makes an entry of a legend."""
  look.setdefault('markersize', 5)
  return Line2D([], [], label=label, **look)


def method_handles(shown: Sequence[str]) -> list[Line2D]:
  """Makes the entries of methods."""
  return [handle(names.title(m), **METHOD_LOOKS[m]) for m in shown]


def base_handles(bases: Sequence[str]) -> list[Line2D]:
  """Makes the entries of bases."""
  return [handle(f'{names.title(b)} base', **BASE_LOOKS[b]) for b in bases]


def steps(values: Sequence[Any]) -> dict[Any, dict[str, Any]]:
  """Returns looks for the values of an ordered series, from dark to light."""
  positions = np.linspace(0, 0.82, len(values)) if len(values) > 1 else [0.3]
  return {
    value: {'color': colors.to_hex(colormaps['viridis'](place)), 'marker': mark}
    for value, place, mark in zip(
      values, positions, itertools.cycle('osD^vPX'), strict=False
    )
  }
