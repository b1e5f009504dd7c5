"""Curves over one hyperparameter, on validation and on test examples."""

from collections.abc import Iterable, Iterator, Mapping
import itertools
import json
from typing import NamedTuple

import numpy as np

from experiments.scale_study.analysis.aggregate import (
  BASE,
  Countable,
  FEWEST_MERGED,
  Grid,
  Results,
  SUBSET,
  without_gain,
)
from experiments.scale_study.analysis.bootstrap import mean
from experiments.scale_study.analysis.cells import Cell
from experiments.scale_study.analysis.measures import held_in


class SweepPoint(NamedTuple):
  """One point of a curve, mean over subsets and seeds.

  Attributes:
    parameter: what is swept.
    others: the hyperparameters held fixed, as JSON.
    x: value of the parameter.
    value: held-in, merge ÷ expert.
    low: end of its interval.
    high: end of its interval.
    by_seed: held-in with each seed alone.
  """

  size: str
  base: str
  method: str
  n: int
  parameter: str
  others: str
  split: str
  x: float
  value: float
  low: float
  high: float
  by_seed: Mapping[int, float]


def sweep_points(results: Results) -> list[SweepPoint]:
  """Finds every curve: points that differ in one hyperparameter alone.

  All points of a curve, from both bases, count the same categories: those that
  the study counts and in which the few examples of a sweep show a gain.
  """
  swept = [
    cell
    for cell in results.cells
    if cell.setting == 'sweep' and cell.n >= FEWEST_MERGED
  ]
  groups: dict[tuple, dict[float, list[Cell]]] = {}
  for cell in swept:
    for parameter, x in cell.hyperparameters.items():
      others = {
        name: value
        for name, value in cell.hyperparameters.items()
        if name != parameter
      }
      written = json.dumps(others, sort_keys=True)
      group = (cell.method, parameter, written, cell.split)
      groups.setdefault(group, {}).setdefault(x, []).append(cell)
  return [
    point
    for (_, parameter, others, split), cells in groups.items()
    if len(cells) > 1
    if (countable := _countable(results, itertools.chain(*cells.values())))
    for x in sorted(cells)
    for point in _points(
      Grid.of(cells[x], results, countable), (parameter, others, split, x)
    )
  ]


def _countable(results: Results, cells: Iterable[Cell]) -> Countable:
  countable = dict(results.countable)
  for cell in cells:
    arm = cell.size, cell.base
    countable[arm] = countable[arm].difference(without_gain(cell))
  return Grid.of((), results, countable).alike(BASE).countable


def _points(
  grid: Grid, place: tuple[str, str, str, float]
) -> Iterator[SweepPoint]:
  value, low, high = grid.estimate(held_in)
  by_seed = mean(grid.values(held_in), axis=SUBSET)
  for index in np.ndindex(value.shape):
    if not np.isnan(value[index]):
      i, b, m, k = index
      yield SweepPoint(
        grid.sizes[i],
        grid.bases[b],
        grid.methods[m],
        grid.ns[k],
        *place,
        float(value[index]),
        float(low[index]),
        float(high[index]),
        {
          seed: float(own[index])
          for seed, own in zip(grid.seeds, by_seed, strict=True)
          if not np.isnan(own[index])
        },
      )
