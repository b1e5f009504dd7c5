"""What would be found with one category less.

Intervals are of seeds: categories are not drawn, so nothing says how far an
effect hangs on which there are. Here each finding is judged anew without one of
the categories that it counts, one after another.
"""

from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

from experiments.scale_study.analysis import effects, verdicts
from experiments.scale_study.analysis.aggregate import Grid, Results
from experiments.scale_study.analysis.cells import category
from experiments.scale_study.analysis.measures import held_in
from experiments.scale_study.analysis.verdicts import Outcome, Verdict


class LeftOut(NamedTuple):
  """A finding, judged without one category.

  Attributes:
    finding: its number.
    category: what is left out.
    effect: as a verdict has it.
    low: lower end of its 95 % interval.
    high: upper end.
    verdict: by the rule of all verdicts.
    differs: whether the interval lies elsewhere than that of all categories:
      above 0, below, or around it.
  """

  finding: str
  category: str
  effect: float
  low: float
  high: float
  verdict: Outcome
  differs: bool


def each(results: Results) -> Iterator[LeftOut]:
  """Judges every finding that is testable, without each of its categories."""
  grid = results.grid()
  cells = grid.cells.values()
  held_out = {category(task) for cell in cells for task in cell.held_out}
  counted = frozenset().union(*grid.countable.values())
  for finding in effects.FINDERS:
    of_all = _judge(grid, finding)
    if of_all.verdict == 'not testable':
      continue
    of_it = counted & held_out if finding[0] == '3' else counted - held_out
    for name in sorted(of_it) if len(of_it) > 1 else ():
      left = {arm: names - {name} for arm, names in grid.countable.items()}
      verdict = _judge(dataclasses.replace(grid, countable=left), finding)
      yield LeftOut(
        finding,
        name,
        verdict.effect,
        verdict.low,
        verdict.high,
        verdict.verdict,
        _side(verdict) != _side(of_all),
      )


def _judge(grid: Grid, finding: str) -> Verdict:
  if not grid.cells:
    return verdicts.judge(finding, 'no such merge was run', '', '')
  effect = effects.FINDERS[finding](grid, held_in)
  return verdicts.judge(finding, effect, 'validated', 'ratio')


def _side(verdict: Verdict) -> int:
  return int(verdict.low > 0) - int(verdict.high < 0)
