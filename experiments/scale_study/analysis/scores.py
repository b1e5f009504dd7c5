"""Scores as they are, not divided by anything: a table for each arm."""

from collections.abc import Iterable, Sequence
import dataclasses
import statistics

import numpy as np

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.aggregate import Grid, Results
from experiments.scale_study.analysis.bootstrap import mean
from experiments.scale_study.analysis.cells import (
  category,
  category_scores,
  Cell,
  Scores,
)


@dataclasses.dataclass(frozen=True)
class Table:
  """What the models of a size and base score.

  Attributes:
    size: of the models.
    base: of the experts.
    n: numbers of experts merged, ascending.
    columns: 'chance', 'base', 'expert', 'multitask', then methods.
    held_in: categories.
    held_out: categories.
    untestable: those of either that may not be counted.
    values: mean over tasks, subsets and seeds, held-in categories first,
      [n, categories, columns]; NaN where there is none.
  """

  size: str
  base: str
  n: tuple[int, ...]
  columns: tuple[str, ...]
  held_in: tuple[str, ...]
  held_out: tuple[str, ...]
  untestable: frozenset[str]
  values: np.ndarray

  def held_in_means(self) -> np.ndarray:
    """Means over the held-in categories, [n, columns]."""
    return mean(self.values[:, : len(self.held_in)], axis=1)


def tables(results: Results) -> list[Table]:
  """Makes the tables of all arms, of merges with validated hyperparameters."""
  grid = results.grid()
  made = []
  for size in grid.sizes:
    for base in grid.bases:
      cells = [
        cell
        for cell in grid.cells.values()
        if (cell.size, cell.base) == (size, base)
      ]
      if cells:
        made.append(_table(grid, cells))
  return made


def text(made: Iterable[Table]) -> str:
  """Lays tables out for a terminal, categories for the most experts alone."""
  return '\n\n'.join(_text(table) for table in made)


def _table(grid: Grid, cells: Sequence[Cell]) -> Table:
  chance = grid.results.chance()
  held_in, held_out = (
    tuple(dict.fromkeys(category(task) for cell in cells for task in of(cell)))
    for of in (lambda cell: cell.held_in, lambda cell: cell.held_out)
  )

  def values(n: int, name: str) -> list[float]:
    chosen = [
      cell
      for cell in cells
      if cell.n == n and (name in cell.subset or name in held_out)
    ]
    return [
      # Means of the columns are to be over the same categories.
      chance.get(name, np.nan) if chosen else np.nan,
      _mean(_score(cell, cell.base_scores, name) for cell in chosen),
      _mean(_score(cell, cell.expert, name) for cell in chosen),
      _mean(_score(cell, cell.multitask, name) for cell in chosen),
      *(
        _mean(_score(c, c.scores, name) for c in chosen if c.method == method)
        for method in grid.methods
      ),
    ]

  return Table(
    cells[0].size,
    cells[0].base,
    grid.ns,
    ('chance', 'base', 'expert', 'multitask', *grid.methods),
    held_in,
    held_out,
    frozenset(
      {*held_in, *held_out} - grid.countable[cells[0].size, cells[0].base]
    ),
    np.array(
      [[values(n, name) for name in (*held_in, *held_out)] for n in grid.ns]
    ),
  )


def _text(table: Table) -> str:
  rows = [
    *zip((*table.held_in, *table.held_out), table.values[-1], strict=True),
    *(
      (f'mean held-in, N = {n}', row)
      for n, row in zip(table.n, table.held_in_means(), strict=True)
    ),
  ]
  lines = [
    (f'{table.size}, {table.base}, N = {table.n[-1]}', *table.columns),
    *(
      (name, *(names.number(value, digits=3) for value in row))
      for name, row in rows
    ),
  ]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    first.ljust(widths[0])
    + ''.join(
      f'  {entry.rjust(width)}'
      for entry, width in zip(entries, widths[1:], strict=True)
    )
    for first, *entries in lines
  )


def _score(cell: Cell, scores: Scores, name: str) -> float:
  tasks = (*cell.held_in, *cell.held_out)
  return category_scores(scores, tasks).get(name, np.nan)


def _mean(values: Iterable[float]) -> float:
  known = [value for value in values if not np.isnan(value)]
  return statistics.fmean(known) if known else np.nan
