"""ROUGE-L of what models write, beside exact match: a table."""

from collections.abc import Iterable
import csv
import io

from experiments.scale_study import grid
from experiments.scale_study.analysis import cells
from experiments.scale_study.folder import Arm
from experiments.scale_study.scored import Scored
from experiments.scale_study.size import Size

Row = dict[str, str | int | float]


def rows(size: Size, arm: Arm) -> list[Row]:
  """Returns a row for each task that is written, and each model of an arm.

  Models are the base, the task's own expert, the multitask model and, by the
  name of the method, the merges of all experts. There is none where ROUGE-L is
  the score itself.
  """
  if size.config.text_metric == 'rouge_l':
    return []
  scored, made = Scored(size, arm), []

  def add(model: str, task: str, score: float, rouge_l: float) -> None:
    made.append(
      {**arm._asdict(), 'model': model, 'task': task}
      | {'score': round(score, 4), 'rouge_l': round(rouge_l, 4)}
    )

  for model, record in (
    ('base', scored.base),
    ('multitask', scored.multitask),
    *(('expert', record) for record in scored.experts.values()),
  ):
    for task, value in record['rouge_l'].items():
      add(model, task, record['test'][task][0], value)
  for subset in grid.subsets_of(size, arm.seed):
    for cell in cells.load(size.folder.cells(arm, subset.name)):
      for name, value in cell.scores.items():
        task = name.removesuffix(grid.ROUGE_L)
        if task != name:
          add(cell.method, task, cell.scores[task], value)
  return sorted(made, key=lambda row: row['task'])


def table(made: Iterable[Row]) -> str:
  """Returns rows as CSV."""
  text = io.StringIO()
  names = ['size', 'base', 'seed', 'model', 'task', 'score', 'rouge_l']
  writer = csv.DictWriter(text, names, lineterminator='\n')
  writer.writeheader()
  writer.writerows(made)
  return text.getvalue()
