"""Which merge of a method is chosen on validation data."""

from types import SimpleNamespace

import jax.numpy as jnp

from experiments.scale_study.examination import Score
from experiments.scale_study.study_config import MethodGrid
from experiments.scale_study.subsets import Subset
from experiments.scale_study.trials import Trials

OWN = {'qa/a': 1.0, 'qa/b': 1.0, 'qa/c': 1.0, 'topic/d': 0.5}
HARDLY_LEARNED = {'qa/a': 0.1, 'qa/b': 0.9, 'topic/d': 1.0}


def chosen(*scored, own=OWN):
  """The scale that is chosen, of one after another with their scores."""
  scores = iter(scored)
  size = SimpleNamespace(
    config=SimpleNamespace(
      methods={
        'ties': MethodGrid({'scale': 9.0}, {'scale': (*range(len(scored)),)})
      },
      sweeps={},
    ),
    source=SimpleNamespace(held_in=('qa', 'topic', 'sentiment')),
    examination=SimpleNamespace(
      scores=lambda params, split, categories=None: {
        task: Score(value, 1.0)
        for task, value in zip(own, next(scores), strict=True)
      }
    ),
  )
  params = {'kernel': jnp.ones(2)}
  trials = Trials(size, Subset(0, ('qa', 'topic')), params, own)
  for merge in trials.wanted[: len(scored)]:
    trials.score(merge, params)
  return trials.chosen['ties'].merge.values['scale']


def test_categories_count_alike_however_many_data_sets_they_have():
  # Merge ÷ expert is 0.9 and 0.4, against 0.6 and 1. Over all four data sets
  # the first would be the better one: 0.775 against 0.7.
  assert chosen((0.9, 0.9, 0.9, 0.2), (0.6, 0.6, 0.6, 0.5)) == 1


def test_a_data_set_that_its_expert_hardly_learned_does_not_decide():
  # Merge ÷ expert of the categories is 0.6 and 0.9, against 1 and 0.7. Of the
  # data sets of the first category it is 3 and 0.33, against 1 and 1.
  first, second = (0.3, 0.3, 0.9), (0.1, 0.9, 0.7)
  assert chosen(first, second, own=HARDLY_LEARNED) == 1


def test_of_equals_the_first_is_chosen():
  assert chosen((0.9, 0.8, 0.7, 0.2), (0.7, 0.8, 0.9, 0.2)) == 0
