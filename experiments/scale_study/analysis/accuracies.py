"""Accuracies by task with their sampling errors, as Markdown.

Of merges whose hyperparameters were chosen on validation data. An accuracy is
the mean over the tasks of a category and over all models of a row; held-in
categories count where their expert is among the merged. A category that may not
be counted is not testable: it is marked and in no mean. Held-in or held-out has
no mean where one of its categories has no accuracy.

Behind ± is the standard error of an accuracy over the test questions; of scores
between right and wrong it is that at most. All models answer the same
questions, so more seeds do not lessen it, and differences between rows vary
less.
"""

from collections.abc import Collection, Mapping, Sequence
import json
import math
from pathlib import Path
import statistics

from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.cells import category, Cell

# Accuracies by task, of each model.
_Scores = Sequence[Mapping[str, float]]
# An accuracy and its error: NaN what is not known.
_Entry = tuple[float, float]
_MISSING: _Entry = (math.nan, math.nan)


def load_questions(folder: Path) -> dict[str, int]:
  """Reads how many test questions each task has; none of older results."""
  path = folder / 'questions.json'
  return json.loads(path.read_text('utf-8')) if path.is_file() else {}


def text(results: Results, questions: Mapping[str, int]) -> str:
  """Returns a table for each size and base, with a heading if several.

  Args:
    results: of the study.
    questions: of the test, by task; where there are none, nothing is said of
      the error.
  """
  grid = results.grid()
  arms = {}
  for cell in grid.cells.values():
    arms.setdefault((cell.size, cell.base), []).append(cell)
  parts = []
  for size in grid.sizes:
    for base in grid.bases:
      if merges := arms.get((size, base)):
        heading = f'### {size}, {base} base\n\n'
        countable = grid.countable[size, base]
        table = _table(merges, grid.methods, countable, questions)
        parts.append(heading * (len(arms) > 1) + table)
  return '\n'.join(parts)


def _table(
  merges: Sequence[Cell],
  methods: Sequence[str],
  countable: Collection[str],
  questions: Mapping[str, int],
) -> str:
  rows = {
    'base': [cell.base_scores for cell in merges],
    'experts': [cell.expert for cell in merges],
    'multitask': [cell.multitask for cell in merges],
  }
  for method in methods:
    for n in sorted({cell.n for cell in merges}):
      made = [c for c in merges if (c.method, c.n) == (method, n)]
      if made:
        rows[f'{method}, N = {n}'] = [*map(_counted, made)]
  sides = [_by_category(merges[0].held_in), _by_category(merges[0].held_out)]
  names = []
  for side, mean in zip(sides, ('held-in', 'held-out'), strict=True):
    names += [
      name.replace('_', ' ') + ' (not testable)' * (name not in countable)
      for name in side
    ]
    names.append(f'**{mean}**')
  lines = [f'| | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']
  for name, scores in rows.items():
    entries = []
    for side in sides:
      found = {
        name: _mean([_entry(scores, task, questions) for task in tasks])
        for name, tasks in side.items()
      }
      entries += found.values()
      entries.append(_mean([found[c] for c in found if c in countable]))
    lines.append(f'| {name} | {" | ".join(map(_written, entries))} |')
  return '\n'.join(lines) + '\n'


def _counted(cell: Cell) -> dict[str, float]:
  tasks = (*cell.merged_tasks, *cell.held_out)
  return {task: cell.scores[task] for task in tasks}


def _by_category(tasks: Sequence[str]) -> dict[str, list[str]]:
  grouped: dict[str, list[str]] = {}
  for task in tasks:
    grouped.setdefault(category(task), []).append(task)
  return grouped


def _entry(scores: _Scores, task: str, questions: Mapping[str, int]) -> _Entry:
  # Experts are scored on tasks of their own only, and merges count on them.
  found = [of[task] for of in scores if task in of]
  if not found:
    return _MISSING
  mean = statistics.fmean(found)
  if task not in questions:
    return mean, math.nan
  return mean, math.sqrt(mean * (1 - mean) / questions[task])


def _mean(entries: Sequence[_Entry]) -> _Entry:
  if not entries:
    return _MISSING
  values, errors = zip(*entries, strict=True)
  return statistics.fmean(values), math.hypot(*errors) / len(errors)


def _written(entry: _Entry) -> str:
  value, error = entry
  if math.isnan(value):
    return '–'
  return f'{value:.2f}' if math.isnan(error) else f'{value:.2f} ± {error:.2f}'
