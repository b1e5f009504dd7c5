"""What is asked of each merge of a subset, and what came of it."""

from collections.abc import Mapping
import dataclasses
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.scale_study.analysis.cells import category_scores
from experiments.scale_study.examination import Score
from experiments.scale_study.merge_points import candidates, fixed, Merge, swept
from experiments.scale_study.model import Params
from experiments.scale_study.size import Size
from experiments.scale_study.subsets import Subset


class Result(NamedTuple):
  """A merge of an arm and how it does.

  ROUGE-L is known of the merges of all experts, chosen on validation data.
  """

  merge: Merge
  setting: str
  split: str
  scores: dict[str, Score]
  drift: float
  rouge_l: Mapping[str, float]


class Chosen(NamedTuple):
  """The best candidate of a method so far.

  Attributes:
    kept: of its experts, on validation data; 0 where there is no choice.
    merge: the candidate.
    params: its parameters.
  """

  kept: float
  merge: Merge
  params: Params


@dataclasses.dataclass
class _Outcome:
  """What is known of a merge: scores are empty where none were asked for."""

  drift: float
  validation: dict[str, Score] = dataclasses.field(default_factory=dict)
  test: dict[str, Score] = dataclasses.field(default_factory=dict)


class Trials:
  """The merges of a subset, scored as far as somebody asks.

  Attributes:
    wanted: the merges, in the order in which they are to be made.
    chosen: by method, what is best on validation data.
  """

  def __init__(
    self, size: Size, subset: Subset, base: Params, own: Mapping[str, float]
  ):
    """Lists the merges.

    Args:
      size: of the models.
      subset: of the experts that are merged.
      base: of the experts.
      own: what each expert scores on its own tasks of the validation data.
    """
    self._size, self._subset = size, subset
    self._base, self._own = base, own
    self._candidates, self._fixed = candidates(size.config), fixed(size.config)
    self._swept = swept_of(size, subset)
    options = [
      merge for merges in self._candidates.values() for merge in merges
    ]
    self.wanted = [
      *dict.fromkeys([*options, *self._fixed.values(), *self._swept])
    ]
    self.chosen: dict[str, Chosen] = {}
    self._outcomes: dict[Merge, _Outcome] = {}
    self._written: dict[str, dict[str, float]] = {}

  def score(self, merge: Merge, params: Params) -> None:
    """Scores one of the merges as soon as it is made."""
    exam = self._size.examination
    options = self._candidates[merge.method]
    outcome = _Outcome(float(_drift(params, self._base)))
    if (len(options) > 1 and merge in options) or merge in self._swept:
      categories = self._subset.categories
      outcome.validation = exam.scores(params, 'validation', categories)
    if merge in self._fixed.values() or merge in self._swept:
      outcome.test = exam.scores(params, 'test')
    self._outcomes[merge] = outcome
    if merge in options:
      kept = _kept(outcome.validation, self._own) if outcome.validation else 0.0
      best = self.chosen.get(merge.method)
      if best is None or kept > best.kept:
        self.chosen[merge.method] = Chosen(kept, merge, params)

  def test_chosen(self) -> None:
    """Scores what was chosen on test data, once all merges are made."""
    exam = self._size.examination
    for method, (_, merge, params) in self.chosen.items():
      outcome = self._outcomes[merge]
      outcome.test = outcome.test or exam.scores(params, 'test')
      if is_everything(self._size, self._subset):
        self._written[method] = exam.written(params)

  def results(self) -> list[Result]:
    """Lists what was chosen, the fixed setting, and the points of sweeps."""
    chosen = [best.merge for best in self.chosen.values()]
    of_test = [
      *((merge, 'validated', 'test') for merge in chosen),
      *((merge, 'fixed', 'test') for merge in self._fixed.values()),
    ]
    of_sweep = [
      (merge, 'sweep', split)
      for split in ('validation', 'test')
      for merge in self._swept
    ]
    return [
      Result(
        merge,
        setting,
        split,
        getattr(self._outcomes[merge], split),
        self._outcomes[merge].drift,
        self._written.get(merge.method, {}) if setting == 'validated' else {},
      )
      for merge, setting, split in [*of_test, *of_sweep]
    ]


def is_everything(size: Size, subset: Subset) -> bool:
  """Whether a subset is of all experts."""
  return len(subset.categories) == len(size.source.held_in)


def swept_of(size: Size, subset: Subset) -> list[Merge]:
  """The points of the sweeps, which are of all experts."""
  return swept(size.config) if is_everything(size, subset) else []


def _kept(scores: Mapping[str, Score], own: Mapping[str, float]) -> float:
  """Mean over categories of merge ÷ expert, as the results are reported.

  What an expert scores is taken as 0.05 at least, so that one that fails does
  not decide.
  """
  values = {task: score.value for task, score in scores.items()}
  merged = category_scores(values, scores)
  expert = category_scores(own, scores)
  return statistics.fmean(
    score / max(expert[name], 0.05) for name, score in merged.items()
  )


@jax.jit
def _drift(params: Params, base: Params) -> jax.Array:
  def norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))

  return norm(jax.tree.map(jnp.subtract, params, base)) / norm(base)
