"""A figure with what it shows and a reading of it, computed from the data."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.aggregate import Grid, Results
from experiments.scale_study.analysis.bootstrap import Estimate, MINIMUM_SEEDS
from experiments.scale_study.analysis.cells import category

# Of the tasks of a cell.
SPLITS = ('held_in', 'held_out')


class Picture(NamedTuple):
  """A figure of the report.

  Attributes:
    name: of its file.
    heading: above it.
    reading: what the numbers say, in plain words.
    caption: how to look at it.
    figure: the picture.
  """

  name: str
  heading: str
  reading: str
  caption: str
  figure: Figure


def bars(results: Results) -> str:
  """Says what the bars of a study's figures are."""
  seeds = len(results.seeds)
  alone = (
    'Bars are of each mean alone; differences are paired by seed and are under '
    'Findings.'
  )
  if seeds >= MINIMUM_SEEDS:
    return f'Bars are 95 % intervals over {seeds} seeds. {alone}'
  word = 'one seed was' if seeds == 1 else f'only {seeds} seeds were'
  return (
    f'Bars are 95 % intervals over subsets alone: {word} run, so that nothing '
    'is known about others. Where there is one subset there is no bar, nor '
    f'where a mean counts such an N; long ones leave the panel. {alone}'
  )


def left_out(
  grid: Grid,
  splits: Sequence[str] = SPLITS,
  sizes: Collection[str] | None = None,
) -> str:
  """Says which categories do not count in what was drawn, and where not.

  Args:
    grid: that was drawn.
    splits: of it that were.
    sizes: of it that were; None for all.
  """
  drawn = {
    category(task)
    for cell in grid.cells.values()
    for split in splits
    for task in getattr(cell, split)
  }
  countable = {
    arm: counted
    for arm, counted in grid.countable.items()
    if sizes is None or arm[0] in sizes
  }
  listed = []
  for name in dict.fromkeys(e.category for e in grid.results.exclusions):
    arms = [arm for arm, counted in countable.items() if name not in counted]
    if arms and name in drawn:
      everywhere = len(arms) == len(countable)
      where = '' if everywhere else f' ({"; ".join(map(", ".join, arms))})'
      listed.append(name.replace('_', ' ') + where)
  if not listed:
    return ''
  return (
    'Not counted, since a side of what is compared fails its gates or has no '
    f'gain to keep: {names.join(listed)}. '
  )


def at(series: Estimate, *index) -> tuple[float, float, float]:
  """Returns one estimate of an array of them."""
  return (
    float(series.value[index]),
    float(series.low[index]),
    float(series.high[index]),
  )


def part(series: Estimate, *index) -> Estimate:
  """Returns some of an array of estimates."""
  return Estimate(*(bound[index] for bound in series))
