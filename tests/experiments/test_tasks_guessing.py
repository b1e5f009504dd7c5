"""What answers reach that do not look at the question, counted by hand."""

import itertools

import pytest

from experiments.scale_study.tasks import guessing
from experiments.scale_study.tasks.source import Dataset, Example


def written(train, test):
  """A dataset of texts with these answers."""
  answers = {'train': itertools.cycle(train), 'test': test}
  return Dataset(
    'texts',
    'summarization',
    'rouge_l',
    lambda split, _: (Example('?', answer) for answer in answers[split]),
  )


@pytest.mark.parametrize(
  'train, test, reached',
  [
    # 'a b' is 1 and ½, 'c' is 0 and 2 · 1 / (1 + 2).
    (['c', 'a b'], ['a b', 'a c'], 0.75),
    (['c'], ['a b', 'a c'], 1 / 3),
    # None is learned from itself: of 'a b' and 'a c' the other is ½ right.
    ([], ['a b', 'a c'], 0.25),
    ([], ['a b'], 0.0),
    # Only what is asked counts: the first two of the test.
    (['a b'], ['a b', 'a c', 'd', 'd'], 0.75),
  ],
)
def test_what_a_text_that_is_always_the_same_has_in_common(
  train, test, reached
):
  dataset = written(train, test)
  assert guessing.constant_rouge_l(dataset, 2) == pytest.approx(reached)
