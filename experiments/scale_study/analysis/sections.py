"""The sections of the report that are mostly tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.scale_study.analysis import names, tables
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.law import (
  Fit,
  FITTED_UP_TO,
  which_losses,
)
from experiments.scale_study.analysis.markup import paragraphs, table
from experiments.scale_study.analysis.written import Written

# Parameters of the merging law as its formula has them.
_SYMBOLS = {'floor': 'L*', 'beta': 'β', 'gamma': 'γ'}


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
        f'{_SYMBOLS.get(k, k)} = {names.MISSING if np.isnan(v) else f"{v:.3g}"}'
        for k, v in fit.parameters.items()
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
