"""The sections of the report that are mostly tables."""

from collections.abc import Mapping, Sequence
import html
import inspect
from typing import Any

import numpy as np

from experiments.scale_study.analysis import (
  effects,
  left_out,
  names,
  several,
  tables,
  verdicts,
)
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.bootstrap import (
  MINIMUM_SEEDS,
  widening_of,
)
from experiments.scale_study.analysis.law import (
  Fit,
  FITTED_UP_TO,
  which_losses,
)
from experiments.scale_study.analysis.markup import paragraphs, table
from experiments.scale_study.analysis.verdicts import Verdict
from experiments.scale_study.analysis.written import Written

# Parameters of the merging law as its formula has them.
_SYMBOLS = {'floor': 'L*', 'beta': 'β', 'gamma': 'γ'}


def findings(results: Results, judged: Sequence[Verdict]) -> str:
  """Shows a card for every finding, then the rule."""
  cards = ''.join(
    _card(verdict, [v for v in judged if v.finding in _halves(verdict)])
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


def _card(verdict: Verdict, details: Sequence[Verdict]) -> str:
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
    f'{table(header, rows)}{_by_seed(details)}'
    + (table(['', 'part', 'effect'], parts) if parts else '')
    + '</details></div>'
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


def law(fits: Sequence[Fit]) -> str:
  """Shows the parameters of the merging law, and how well it predicts."""
  header = [
    'base',
    'method',
    'form',
    'parameters',
    'not settled',
    'R² fitted',
    'R² predicted',
    'error predicted',
    'error if unchanged',
    'error of a line',
    'note',
  ]
  rows = [
    (
      names.title(fit.base),
      names.title(fit.method),
      fit.form,
      ', '.join(
        f'{_SYMBOLS.get(k, k)} = {v:.3g}' for k, v in fit.parameters.items()
      ),
      ', '.join(_SYMBOLS.get(k, k) for k in fit.undetermined),
      names.number(fit.r_squared, digits=3),
      names.number(fit.r_squared_predicted, digits=3),
      names.number(fit.error, digits=3),
      names.number(fit.error_unchanged, digits=3),
      names.number(fit.error_line, digits=3),
      fit.note,
    )
    for fit in fits
  ]
  return paragraphs(
    'E[loss | S, N] = L* + B · S^−β + A · S^−γ / (N + b), with S in units of '
    f'the smallest size, fitted where N ≤ {FITTED_UP_TO} and asked about the '
    'rest. With fewer than three sizes each gets F + T / N instead. Beside the '
    'mean error of what it predicts stand those of forecasting no change and '
    'of a line in log N for each size. '
    f'{which_losses(fits)}, also of categories that are not testable, and '
    'like the errors in nats a token.',
  ) + table(header, rows)


def gates(results: Results) -> str:
  """Shows what may not be counted, and every gate."""
  excluded = [
    (e.size, names.title(e.base), e.category, e.reason)
    for e in results.exclusions
  ]
  rows = tables.gate_rows(results)
  passed = sum(gate.passed for gate in results.gates)
  text = (
    'Without any merge, every category has to show that there is something '
    'to measure; how it does is known before anything is merged, from test '
    f'scores. {passed} of {len(results.gates)} gates passed. '
  )
  if excluded:
    text += (
      'These are not testable: no ratio and no verdict counts them. Scores by '
      'category show them as well, and so do losses.'
    )
  else:
    text += 'Every category may be counted.'
  header = ['size', 'base', 'category', 'not testable because']
  return (
    paragraphs(text)
    + (table(header, excluded) if excluded else '')
    + '<details><summary>All gates</summary>'
    + table(list(rows[0]) if rows else [], [r.values() for r in rows])
    + '</details>'
  )


def written_answers(answers: Sequence[Written]) -> str:
  """Shows exact match beside ROUGE-L."""
  if not answers:
    return paragraphs('No answers of this study are scored in both ways.')
  rows = [
    (
      answer.size,
      names.title(answer.base),
      names.title(answer.model),
      names.number(answer.exact),
      names.number(answer.rouge_l),
    )
    for answer in answers
  ]
  return paragraphs(
    'Answers that are sentences count where they match exactly, in the gates, '
    'the ratios and the verdicts. ROUGE-L also sees what is nearly right: mean '
    'over the tasks that are written and over seeds; merges are those of all '
    'experts with validated hyperparameters.'
  ) + table(['size', 'base', 'model', 'exact match', 'ROUGE-L'], rows)


def numbers(results: Results) -> str:
  """Shows the full table."""
  header = [
    'setting',
    'size',
    'base',
    'method',
    'N',
    'held-in',
    'gain kept',
    'multitask held-in',
    'held-out',
    'multitask held-out',
    'drift',
    'seeds',
    'merges',
  ]
  columns = (
    ('held_in', 2),
    ('gain_kept', 2),
    ('held_in_multitask', 2),
    ('held_out', 2),
    ('held_out_multitask', 2),
    ('drift', 3),
  )
  rows = [
    (
      row['setting'],
      row['size'],
      names.title(row['base']),
      names.title(row['method']),
      row['n'],
      *(_with_interval(row, name, digits) for name, digits in columns),
      row['seeds'],
      row['merges'],
    )
    for row in tables.merge_rows(results)
  ]
  return (
    paragraphs(
      'Held-in is merge ÷ expert; gain kept is (merge − base) ÷ (expert − '
      'base); held-out is merge ÷ base. A row counts what may be counted for '
      'its size and base alone; a figure, what may be for all it compares. The '
      'files tables/*.csv hold these and every single merge.'
    )
    + f'<details><summary>{len(rows)} groups of merges</summary>'
    + table(header, rows)
    + '</details>'
  )


def _with_interval(row: Mapping[str, Any], name: str, digits: int) -> str:
  ends = [float(row[name + end] or np.nan) for end in ('', '_low', '_high')]
  return names.interval(*ends, digits=digits)
