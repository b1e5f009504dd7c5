"""The numbers of one merge, each a mean within a category, then over them.

As in arXiv 2410.03617 (Yadav et al., 2025), held-in scores are divided by those
of the task's own expert and held-out scores by those of the base, so that 1.0
is as good as what was merged. The unmerged base alone often keeps half of an
expert's score; `corrected` therefore asks what part of the expert's *gain* is
kept. All take the categories that may be counted and return NaN where the
merge has none of them.
"""

from collections.abc import Callable, Iterable, Mapping
import math
import statistics

from experiments.scale_study.analysis.cells import category, Cell, Scores

Categories = frozenset[str]
Measure = Callable[[Cell, Categories], float]


def held_in(cell: Cell, countable: Categories) -> float:
  """Merge ÷ expert over the held-in tasks of the experts merged."""
  return _ratio(cell.scores, cell.expert, cell.merged_tasks, countable)


def held_in_base(cell: Cell, countable: Categories) -> float:
  """Base ÷ expert over the same tasks: what is kept without any merge."""
  return _ratio(cell.base_scores, cell.expert, cell.merged_tasks, countable)


def held_in_multitask(cell: Cell, countable: Categories) -> float:
  """Multitask model ÷ expert over the same tasks."""
  return _ratio(cell.multitask, cell.expert, cell.merged_tasks, countable)


def held_out(cell: Cell, countable: Categories) -> float:
  """Merge ÷ base over the held-out tasks."""
  return _ratio(cell.scores, cell.base_scores, cell.held_out, countable)


def held_out_multitask(cell: Cell, countable: Categories) -> float:
  """Multitask model ÷ base over the held-out tasks."""
  return _ratio(cell.multitask, cell.base_scores, cell.held_out, countable)


def over_multitask(cell: Cell, countable: Categories) -> float:
  """(Merge − multitask model) ÷ base over the held-out tasks."""
  return held_out(cell, countable) - held_out_multitask(cell, countable)


def corrected(cell: Cell, countable: Categories) -> float:
  """(Merge − base) ÷ (expert − base), the part of the expert's gain kept.

  Scores are averaged within a category first: a data set that the base has
  solved already would divide by nearly nothing.
  """
  return _mean(
    (_score(cell.scores, tasks) - _score(cell.base_scores, tasks))
    / (_score(cell.expert, tasks) - _score(cell.base_scores, tasks))
    for tasks in _by_category(cell.merged_tasks, countable).values()
  )


def drift(cell: Cell, countable: Categories) -> float:
  """Norm of merged − base over norm of base."""
  del countable
  return cell.drift


def loss(cell: Cell, countable: Categories) -> float:
  """Mean loss of the merge over the held-in tasks of the experts merged."""
  del countable
  return cell.loss


def loss_of_all(cell: Cell, countable: Categories) -> float:
  """Mean loss over all held-in tasks, merged or not; NaN if it was not kept."""
  del countable
  return _mean(cell.losses.values())


def guessing(chance: Scores) -> tuple[Measure, Measure]:
  """Returns what held-in and held-out would be for a model that guesses.

  Args:
    chance: score of guessing, by category.
  """

  def ratio(scores: Scores, tasks: list[str], countable: Categories) -> float:
    return _mean(
      chance[name] / _score(scores, tasks)
      for name, tasks in _by_category(tasks, countable).items()
      if name in chance
    )

  return (
    lambda cell, countable: ratio(cell.expert, cell.merged_tasks, countable),
    lambda cell, countable: ratio(
      cell.base_scores, list(cell.held_out), countable
    ),
  )


def _ratio(
  numerator: Scores,
  denominator: Scores,
  tasks: Iterable[str],
  countable: Categories,
) -> float:
  if not numerator:
    return math.nan
  return _mean(
    _mean(numerator[task] / denominator[task] for task in tasks)
    for tasks in _by_category(tasks, countable).values()
  )


def _by_category(
  tasks: Iterable[str], countable: Categories
) -> Mapping[str, list[str]]:
  groups: dict[str, list[str]] = {}
  for task in tasks:
    if category(task) in countable:
      groups.setdefault(category(task), []).append(task)
  return groups


def _score(scores: Scores, tasks: Iterable[str]) -> float:
  return _mean(scores[task] for task in tasks)


def _mean(values: Iterable[float]) -> float:
  values = list(values)
  return statistics.fmean(values) if values else math.nan
