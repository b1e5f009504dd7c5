"""What the study says about each of the paper's five findings.

The rule, the same for all: the finding comes down to one paired effect that is
above 0 if the paper is right (effects.py). It is

  supported      if the 95 % interval of the effect lies above 0,
  not supported  if it does not: it includes 0, or lies below,
  not testable   if some part has fewer than three seeds, there is only one size
                 (findings 2, 4, 5), one base (1) or no six experts (second
                 half of 3), no category passed its gates on both sides, or
                 resampled seeds lie on one side of the effect alone.

A part in which no category may be counted does not enter; the reason names it.

Finding 3 claims two things: it is not supported if one of them is not, else
not testable if one of them is not, else supported.

The verdict itself is on merges with validated hyperparameters and the paper's
ratio. The same rule on fixed hyperparameters, on the part of the expert's gain
that is kept, and with no category left out that has a ratio at all stands
beside it: which categories count hangs on gates, and these on test scores. For
findings 1 and 2 so does base ÷ expert, how much of the effect is there before
anything is merged.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import itertools
from typing import Any, Literal

import numpy as np

from experiments.scale_study.analysis import effects
from experiments.scale_study.analysis.aggregate import (
  Grid,
  Results,
  SEED,
  SUBSET,
)
from experiments.scale_study.analysis.bootstrap import (
  estimate,
  mean,
  MINIMUM_SEEDS,
  student_interval,
)
from experiments.scale_study.analysis.measures import (
  corrected,
  held_in,
  held_in_base,
  Measure,
)

EVERY_RATIO = 'every ratio'
UNMERGED = 'unmerged'

Outcome = Literal['supported', 'not supported', 'not testable']

CLAIMS = {
  '1': 'At equal size, experts of the instruction-tuned base merge better',
  '2': 'Held-in of the merge rises with size',
  '3': 'Held-out of the merge is above the base and, for the large '
  'instruction-tuned model with N ≥ 6, above the multitask model',
  '3a': 'Held-out of the merge is above the base',
  '3b': 'Held-out of the large instruction-tuned merge with N ≥ 6 is above '
  'the multitask model',
  '4': 'The held-in loss from few to many experts shrinks with size',
  '5': 'The spread between methods shrinks with size',
}


@dataclasses.dataclass(frozen=True)
class Part:
  """The effect in one part of the grid; NaN where there is none."""

  where: tuple[str, ...]
  effect: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What one setting and measure say of one finding.

  Attributes:
    finding: its number, '3a' and '3b' for the halves of finding 3.
    claim: the finding in words.
    setting: of the hyperparameters.
    measure: 'ratio' or 'gain', merge ÷ expert or the part of its gain kept;
      `EVERY_RATIO` is the first where no category had to pass a gate,
      `UNMERGED` base ÷ expert. Held-out is always merge ÷ base.
    verdict: by the rule of this module.
    reason: why, in words.
    effect: above 0 if the paper is right; NaN if there is none.
    low: lower end of its 95 % interval.
    high: upper end.
    unit: what the effect is.
    seeds: that entered, the fewest of any size, base, method and N.
    by_seed: the effect with each seed alone.
    student: ends of the 95 % interval that Student's t gives for their mean, to
      be compared with; NaN for fewer than two.
    cells: merges that entered.
    parts: the effects that `effect` is the mean of.
  """

  finding: str
  claim: str
  setting: str
  measure: str
  verdict: Outcome
  reason: str
  effect: float = np.nan
  low: float = np.nan
  high: float = np.nan
  unit: str = ''
  seeds: int = 0
  by_seed: tuple[float, ...] = ()
  student: tuple[float, float] = (np.nan, np.nan)
  cells: int = 0
  parts: tuple[Part, ...] = ()

  @property
  def is_main(self) -> bool:
    """Whether this is the verdict itself, not one beside it."""
    return (self.setting, self.measure) == ('validated', 'ratio')


def judge_all(results: Results) -> list[Verdict]:
  """Judges every finding in every way that was run, the verdict first."""
  ran_fixed = any(cell.setting == 'fixed' for cell in results.cells)
  settings = ('validated', 'fixed') if ran_fixed else ('validated',)
  measures: dict[str, Measure] = {
    'ratio': held_in,
    EVERY_RATIO: held_in,
    'gain': corrected,
    UNMERGED: held_in_base,
  }
  return [
    verdict
    for setting, name in itertools.product(settings, measures)
    for verdict in _judge_grid(
      results.grid(setting, gated=name != EVERY_RATIO),
      setting,
      name,
      measures[name],
    )
    if _has_meaning(verdict)
  ]


def _has_meaning(verdict: Verdict) -> bool:
  if verdict.measure == UNMERGED:
    # A base has no method, and the same scores with any hyperparameters.
    return verdict.finding in '12' and verdict.setting == 'validated'
  # Held-out scores have no expert to be divided by.
  return verdict.measure != 'gain' or not verdict.finding.startswith('3')


def by_finding(judged: Iterable[Verdict]) -> dict[str, dict[str, Any]]:
  """Returns the verdict on each finding as a record, by its number.

  Other settings and measures, which are beside the verdict, are in `others`.
  """
  found: dict[str, dict[str, Any]] = {}
  for verdict in judged:
    record = dataclasses.asdict(verdict)
    if verdict.is_main:
      found[verdict.finding] = {**record, 'others': []}
    else:
      found[verdict.finding]['others'].append(record)
  return found


def judge(
  finding: str, effect: effects.Effect | str, setting: str, measure: str
) -> Verdict:
  """Applies the rule to an effect.

  Args:
    finding: its number.
    effect: of the finding, or why the grid cannot show it.
    setting: for the record.
    measure: for the record.
  """
  what = (finding, CLAIMS[finding], setting, measure)
  if isinstance(effect, str):
    return Verdict(*what, 'not testable', effect)

  def average(means: np.ndarray) -> np.ndarray:
    last = tuple(range(-len(effect.axes), 0))
    return mean(effect.parts(means), axis=last)

  enters = ~np.isnan(effect.values)
  by_arm = np.any(enters, axis=SUBSET).sum(axis=SEED)
  seeds = int(by_arm[by_arm > 0].min()) if enters.any() else 0
  by_seed = average(mean(effect.values, axis=SUBSET))
  by_seed = tuple(map(float, by_seed[~np.isnan(by_seed)]))
  total = estimate(effect.values, average)
  each = estimate(effect.values, effect.parts)
  low, high = float(total.low), float(total.high)
  details = {
    'effect': float(total.value),
    'low': low,
    'high': high,
    'unit': effect.unit,
    'seeds': seeds,
    'by_seed': by_seed,
    'student': student_interval(by_seed),
    'cells': int(enters.sum()),
    'parts': tuple(
      Part(where, *(float(bound[index]) for bound in each))
      for index, where in zip(
        np.ndindex(each.value.shape),
        itertools.product(*effect.axes),
        strict=True,
      )
    ),
  }
  outcome: Outcome = 'not supported'
  if np.isnan(total.value):
    outcome, reason = 'not testable', 'no category may be counted on all sides'
  elif seeds < MINIMUM_SEEDS:
    outcome = 'not testable'
    reason = f'needs {MINIMUM_SEEDS} seeds everywhere; {seeds} run'
  elif np.isnan(low):
    outcome = 'not testable'
    reason = (
      'resampled seeds lie on one side of the effect alone, so that it has no '
      'interval; needs more seeds'
    )
  elif low > 0:
    outcome, reason = 'supported', 'the interval lies above 0'
  elif high < 0:
    reason = 'the interval lies below 0: the opposite was found'
  else:
    reason = 'the interval includes 0'
  empty = [part.where for part in details['parts'] if np.isnan(part.effect)]
  if empty and not np.isnan(total.value):
    parts = '; '.join(', '.join(where) for where in empty)
    reason += f' (no category may be counted in: {parts})'
  if effect.note and not np.isnan(total.value):
    reason += f'; {effect.note}'
  return Verdict(*what, outcome, reason, **details)


def combine(finding: str, halves: list[Verdict]) -> Verdict:
  """Judges a finding that claims several things, by the half that decides."""
  order: list[Outcome] = ['not supported', 'not testable', 'supported']
  deciding = min(halves, key=lambda half: order.index(half.verdict))
  others = [f'{half.finding}: {half.verdict}' for half in halves]
  return dataclasses.replace(
    deciding,
    finding=finding,
    claim=CLAIMS[finding],
    reason=f'{deciding.reason} ({"; ".join(others)})',
  )


def _judge_grid(
  grid: Grid, setting: str, name: str, measure: Measure
) -> Iterator[Verdict]:
  nothing = '' if grid.cells else 'no such merge was run'
  verdicts = {
    finding: judge(finding, nothing or finder(grid, measure), setting, name)
    for finding, finder in effects.FINDERS.items()
  }
  halves = [verdicts['3a'], verdicts['3b']]
  verdicts['3'] = combine('3', halves)
  for finding in CLAIMS:
    yield verdicts[finding]
