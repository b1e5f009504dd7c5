"""The section of the report on the findings: a card each, and the rule."""

from collections.abc import Sequence
import html
import inspect

import numpy as np

from experiments.scale_study.analysis import (
  effects,
  left_out,
  names,
  several,
  verdicts,
)
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.bootstrap import (
  MINIMUM_SEEDS,
  widening_of,
)
from experiments.scale_study.analysis.markup import paragraphs, table
from experiments.scale_study.analysis.verdicts import Verdict


def findings(
  results: Results, judged: Sequence[Verdict], questions: int = 0
) -> str:
  """Shows a card for every finding, then the rule.

  Args:
    results: what was run.
    judged: the verdicts.
    questions: of a task of the test, at most; 0 if it is not known.
  """
  cards = ''.join(
    _card(
      verdict,
      [v for v in judged if v.finding in _halves(verdict)],
      questions,
    )
    for verdict in judged
    if verdict.is_main and verdict.finding in '12345'
  )
  rule = html.escape(inspect.getdoc(verdicts) or '')
  widening = names.number(widening_of(MINIMUM_SEEDS), digits=1)
  return (
    cards + f'<details><summary>The rule</summary><pre>{rule}</pre></details>'
    '<details><summary>The intervals</summary>'
    + paragraphs(
      'Seeds are drawn with replacement, each with all its subsets, 2,000 '
      'times with a fixed seed; both sides of a comparison share every draw. '
      'With so few seeds such an interval is too narrow, so it is widened as '
      'Student’s distribution asks for, with '
      f'{MINIMUM_SEEDS} seeds by a factor of {widening}. With fewer than '
      f'{MINIMUM_SEEDS} seeds only subsets are drawn, and nothing is concluded '
      'from it; what counts an N of one subset then has no interval. The '
      'interval is of seeds, not of test questions: all models '
      'answer the same ones. Where the rule says otherwise than Student’s '
      'interval of the effects of each seed alone, which stands with every '
      'finding, more seeds are needed. Nor does it cover how a preset came to '
      'be, if its grids and rates were chosen after test scores had been seen.'
    )
    + f'</details>{_several(judged)}{_left_out(results)}'
  )


def _several(judged: Sequence[Verdict]) -> str:
  """Shows what is left of the findings if they are asked all at once."""
  corrected = several.corrected(judged)
  if len(corrected) < 2:
    return ''
  rows = [
    (finding, *(names.number(p, digits=3) for p in values))
    for finding, *values in corrected
  ]
  header = ['', 'one-sided p, alone', 'one-sided, Holm', 'two-sided, Holm']
  return (
    '<details><summary>Several findings at once</summary>'
    + paragraphs(
      'No verdict is corrected for how many there are. Holm’s correction would '
      f'leave these p values of the {len(corrected)} effects, by Student’s t '
      'of the seeds: one-sided for an effect above 0, two-sided for any.'
    )
    + f'{table(header, rows)}</details>'
  )


def _left_out(results: Results) -> str:
  """Shows on which categories the findings hang."""
  rows = [
    (
      row.finding,
      row.category,
      names.interval(row.effect, row.low, row.high, signed=True, digits=3),
      row.verdict,
      'yes' if row.differs else '',
    )
    for row in left_out.each(results)
  ]
  if not rows:
    return ''
  header = ['', 'without', 'effect', 'verdict', 'lies elsewhere']
  return (
    '<details><summary>One category less</summary>'
    + paragraphs(
      'Categories are not drawn, so no interval says how far an effect hangs '
      'on which there are. Without one of them it is this; where the interval '
      'lies elsewhere (above 0, below, around it) than with all, the finding '
      'hangs on that category.'
    )
    + f'{table(header, rows)}</details>'
  )


def _halves(verdict: Verdict) -> tuple[str, ...]:
  return ('3a', '3b') if verdict.finding == '3' else (verdict.finding,)


def _card(verdict: Verdict, details: Sequence[Verdict], questions: int) -> str:
  kind = verdict.verdict.replace(' ', '-')
  effect = f'{verdict.reason}.'
  if verdict.unit:
    effect = (
      f'{_effect(verdict)}: {verdict.unit}. '
      f'{names.counted(verdict.seeds, "seed")}, '
      f'{names.counted(verdict.cells, "merge")}; {verdict.reason}.'
    )
  rows = [
    (
      v.finding,
      v.setting,
      v.measure,
      v.verdict,
      _effect(v),
      v.seeds,
      v.cells,
    )
    for v in details
  ]
  header = ['', 'setting', 'measure', 'verdict', 'effect', 'seeds', 'merges']
  parts = [
    (v.finding, ', '.join(names.title(word) for word in part.where), value)
    for v in details
    if v.is_main
    for part in v.parts
    if (value := _effect(part)) != names.MISSING
  ]
  how = ' '.join(
    (inspect.getdoc(finder) or '').replace('\n', ' ')
    for number, finder in effects.FINDERS.items()
    if number in _halves(verdict)
  )
  return (
    f'<div class="finding {kind}"><h3>{verdict.finding}. '
    f'{html.escape(verdict.claim)}</h3>'
    f'<p><span class="badge">{verdict.verdict}</span></p>'
    f'{paragraphs(effect[0].upper() + effect[1:])}'
    f'<details><summary>How, and in which parts</summary>{paragraphs(how)}'
    f'{table(header, rows)}{_of_questions(questions)}{_by_seed(details)}'
    + (table(['', 'part', 'effect'], parts) if parts else '')
    + '</details></div>'
  )


def _of_questions(count: int) -> str:
  if not count:
    return ''
  return paragraphs(
    'Intervals do not cover which questions were asked, as all seeds answer '
    f'the same: one more of {count} is {1 / count:.3f} of the score of a task, '
    'and an effect that is far below this may be of the questions.'
  )


def _by_seed(details: Sequence[Verdict]) -> str:
  """The effects of each seed alone, of the verdicts themselves."""
  rows = [
    (
      verdict.finding,
      ', '.join(
        names.number(value, signed=True, digits=3) for value in verdict.by_seed
      ),
      names.interval(
        float(np.mean(verdict.by_seed)), *verdict.student, signed=True, digits=3
      ),
    )
    for verdict in details
    if verdict.is_main and verdict.by_seed
  ]
  header = ['', 'each seed alone', 'Student’s interval']
  return table(header, rows) if rows else ''


def _effect(estimate) -> str:
  return names.interval(
    estimate.effect, estimate.low, estimate.high, signed=True, digits=3
  )
