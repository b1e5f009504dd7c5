"""Accuracies of a study by task, with their sampling errors, as Markdown.

  python -m experiments.tools.accuracy_table RESULTS_DIR

Writes tables/accuracies.md, of merges whose hyperparameters were chosen on
validation data. An accuracy is the mean over the tasks of a category and over
all models of a row; held-in categories count where their expert is among the
merged. A category whose gate failed is not testable: it is marked and in no
mean. A mean is missing where one of the others is.

Behind ± is the standard error of an accuracy over the test questions. All
models answer the same questions, so more seeds do not lessen it, and
differences between rows vary less. It is left out where scores are no parts of
as many questions as the preset asks at most: a task has fewer then, and nobody
noted how many, or it is not scored by right and wrong.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import json
import math
from pathlib import Path
import statistics

from absl import app

from experiments.scale_study.analysis import cells
from experiments.scale_study.analysis.cells import Cell, METHODS

# Accuracies by task, of each model.
_Scores = Sequence[Mapping[str, float]]
# An accuracy and its error: NaN what is not known.
_Entry = tuple[float, float]
_MISSING: _Entry = (math.nan, math.nan)


def main(argv: list[str]) -> str | None:
  """Reads the one argument, prints the table, and returns what went wrong."""
  if len(argv) != 2:
    raise app.UsageError('Give one folder that has cells.jsonl, config.json.')
  folder = Path(argv[1])
  for name in ('cells.jsonl', 'config.json', 'gates.json'):
    if not (folder / name).is_file():
      return f'{folder / name} is missing: give the folder of a study.'
  config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  failed = [
    g.category for g in cells.load_gates(folder / 'gates.json') if not g.passed
  ]
  try:
    text = table(
      cells.load(folder / 'cells.jsonl'), config['test_examples'], failed
    )
  except ValueError as error:
    return f'{error}'
  (folder / 'tables').mkdir(exist_ok=True)
  (folder / 'tables' / 'accuracies.md').write_text(text, encoding='utf-8')
  print(text)
  return None


def table(
  merges: Iterable[Cell], questions: int, untestable: Collection[str] = ()
) -> str:
  """Returns the table of all validated merges.

  Args:
    merges: of one size and base.
    questions: of each task, at most.
    untestable: categories that are in no mean.

  Raises:
    ValueError: if they are of several sizes or bases, or none is validated.
  """
  merges = [cell for cell in merges if cell.setting == 'validated']
  arms = sorted({f'{cell.size}/{cell.base}' for cell in merges})
  if len(arms) != 1:
    raise ValueError(
      'The table is of one size and base, but there are merges with validated '
      f'hyperparameters of {", ".join(arms) or "none"}. Take a study of one.'
    )
  rows = {
    'base': [cell.base_scores for cell in merges],
    'experts': [cell.expert for cell in merges],
    'multitask': [cell.multitask for cell in merges],
  }
  for method in METHODS:
    for n in sorted({cell.n for cell in merges}):
      made = [c for c in merges if (c.method, c.n) == (method, n)]
      if made:
        rows[f'{method}, N = {n}'] = [*map(_counted, made)]
  sides = [_by_category(merges[0].held_in), _by_category(merges[0].held_out)]
  names = []
  for side, mean in zip(sides, ('held-in', 'held-out'), strict=True):
    names += [
      name.replace('_', ' ') + ' (not testable)' * (name in untestable)
      for name in side
    ]
    names.append(f'**{mean}**')
  lines = [f'| | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']
  for name, scores in rows.items():
    entries = []
    for side in sides:
      found = {
        category: _mean([_entry(scores, task, questions) for task in tasks])
        for category, tasks in side.items()
      }
      entries += found.values()
      entries.append(_mean([found[c] for c in found if c not in untestable]))
    lines.append(f'| {name} | {" | ".join(map(_written, entries))} |')
  return '\n'.join(lines) + '\n'


def _counted(cell: Cell) -> dict[str, float]:
  tasks = (*cell.merged_tasks, *cell.held_out)
  return {task: cell.scores[task] for task in tasks}


def _by_category(tasks: Iterable[str]) -> dict[str, list[str]]:
  grouped: dict[str, list[str]] = {}
  for task in tasks:
    grouped.setdefault(cells.category(task), []).append(task)
  return grouped


def _entry(scores: _Scores, task: str, questions: int) -> _Entry:
  # Experts are scored on tasks of their own only, and merges count on them.
  found = [of[task] for of in scores if task in of]
  if not found:
    return _MISSING
  mean = statistics.fmean(found)
  right = [score * questions for score in found]
  if any(abs(count - round(count)) > 1e-6 for count in right):
    return mean, math.nan
  return mean, math.sqrt(mean * (1 - mean) / questions)


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


if __name__ == '__main__':
  app.run(main)
