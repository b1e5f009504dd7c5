"""The numbers of one merge, each a mean within a category, then over them.

As in arXiv 2410.03617 (Yadav et al., 2025), held-in scores are divided by those
of the task's own expert and held-out scores by those of the base, so that 1.0
is as good as what was merged. The unmerged base alone often keeps half of an
expert's score; `corrected` therefore asks what part of the expert's *gain* is
kept. Scores are averaged within a category before they are divided: the expert
of a category that passed its gates may hardly have learned one of its data
sets, and would divide by nearly nothing. All take the categories that may be
counted and return NaN where the merge has none of them.
"""

from collections.abc import Callable, Iterable
import math
import statistics

from experiments.scale_study.analysis.cells import (
  category,
  category_scores,
  Cell,
  Scores,
)

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
  """(Merge − base) ÷ (expert − base), the part of the expert's gain kept."""
  tasks = _counted(cell.merged_tasks, countable)
  merge, base, expert = (
    category_scores(of, tasks)
    for of in (cell.scores, cell.base_scores, cell.expert)
  )
  return _mean(
    (merge[name] - base[name]) / (expert[name] - base[name]) for name in merge
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

  def ratio(
    scores: Scores, tasks: Iterable[str], countable: Categories
  ) -> float:
    below = category_scores(scores, _counted(tasks, countable))
    return _mean(chance[name] / below[name] for name in below if name in chance)

  return (
    lambda cell, countable: ratio(cell.expert, cell.merged_tasks, countable),
    lambda cell, countable: ratio(cell.base_scores, cell.held_out, countable),
  )


def _ratio(
  numerator: Scores,
  denominator: Scores,
  tasks: Iterable[str],
  countable: Categories,
) -> float:
  counted = _counted(tasks, countable)
  above, below = (category_scores(x, counted) for x in (numerator, denominator))
  return _mean(above[name] / below[name] for name in above)


def _counted(tasks: Iterable[str], countable: Categories) -> list[str]:
  return [task for task in tasks if category(task) in countable]


def _mean(values: Iterable[float]) -> float:
  values = list(values)
  return statistics.fmean(values) if values else math.nan
