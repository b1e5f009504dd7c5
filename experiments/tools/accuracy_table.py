"""Accuracies of a study by task, with their sampling errors, as Markdown.

  python -m experiments.tools.accuracy_table RESULTS_DIR

Writes tables/accuracies.md, of merges whose hyperparameters were chosen on
validation data. An accuracy is the mean over all models of a row; held-in tasks
count where their expert is among the merged. A task whose gate failed is not
testable: it is marked and in no mean. Behind ± is the standard error of
an accuracy over the test questions. All models answer the same questions, so
more seeds do not lessen it, and differences between rows vary less.
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


def main(argv: list[str]) -> None:
  """Reads the one argument and prints the table."""
  if len(argv) != 2:
    raise app.UsageError('Give one folder that has cells.jsonl, config.json.')
  folder = Path(argv[1])
  config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  failed = [
    g.category for g in cells.load_gates(folder / 'gates.json') if not g.passed
  ]
  text = table(
    cells.load(folder / 'cells.jsonl'), config['test_examples'], failed
  )
  (folder / 'tables' / 'accuracies.md').write_text(text, encoding='utf-8')
  print(text)


def table(
  merges: Iterable[Cell], questions: int, untestable: Collection[str] = ()
) -> str:
  """Returns the table of all validated merges.

  Args:
    merges: of one size and base.
    questions: of each task.
    untestable: categories that are in no mean.

  Raises:
    ValueError: if they are of several sizes or bases, or none is validated.
  """
  merges = [cell for cell in merges if cell.setting == 'validated']
  arms = {(cell.size, cell.base) for cell in merges}
  if len(arms) != 1:
    raise ValueError(f'The table is of one size and base, not of {arms}.')
  held_in, held_out = merges[0].held_in, merges[0].held_out
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
  untestable = {
    task for task in (*held_in, *held_out) if cells.category(task) in untestable
  }
  name = lambda task: (
    cells.category(task).replace('_', ' ')
    + ' (not testable)' * (task in untestable)
  )
  names = [*map(name, held_in), '**held-in**']
  names += [*map(name, held_out), '**held-out**']
  lines = [f'| | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']
  for name, scores in rows.items():
    entries = [
      *_entries(scores, held_in, questions, untestable),
      *_entries(scores, held_out, questions, untestable),
    ]
    lines.append(f'| {name} | {" | ".join(entries)} |')
  return '\n'.join(lines) + '\n'


def _counted(cell: Cell) -> dict[str, float]:
  tasks = (*cell.merged_tasks, *cell.held_out)
  return {task: cell.scores[task] for task in tasks}


def _entries(
  scores: _Scores,
  tasks: Sequence[str],
  questions: int,
  untestable: Collection[str],
) -> list[str]:
  """The accuracy of each task, and the mean of those that are testable."""
  found = [[of[task] for of in scores if task in of] for task in tasks]
  # Experts are scored on tasks of their own only.
  if not all(found):
    return ['–'] * (len(tasks) + 1)
  means = [statistics.fmean(values) for values in found]
  errors = [math.sqrt(p * (1 - p) / questions) for p in means]
  counted = [i for i, task in enumerate(tasks) if task not in untestable]
  entries = [
    f'{mean:.2f} ± {error:.2f}'
    for mean, error in zip(means, errors, strict=True)
  ]
  if not counted:
    return [*entries, '–']
  of_mean = math.hypot(*(errors[i] for i in counted)) / len(counted)
  mean = statistics.fmean(means[i] for i in counted)
  return [*entries, f'{mean:.2f} ± {of_mean:.2f}']


if __name__ == '__main__':
  app.run(main)
