"""What answers reach that do not look at the question, counted by hand."""

import itertools

import numpy as np
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


def choices(*answers):
  """Examples whose candidates are the letters beside the answer's."""
  candidates = {'g': 'gb', 'b': 'gb', 'h': 'hi', 'i': 'hi', 'x': 'xyz'}
  return [
    Example(f'{number}?', answer, tuple(candidates[answer]))
    for number, answer in enumerate(answers)
  ]


@pytest.mark.parametrize(
  'test, reached',
  [
    # 'g' three times of four, 'h' of 'hi' twice, and a guess of 'xyz'.
    ('gggbhhxxx', (3 + 2 + 1) / 9),
    # What training says is not what is asked: a guess does better.
    ('bbbgi', (2 + 0.5) / 5),
    # Guesses are not taken for some candidates only.
    ('bbhhh', (0 + 3) / 5),
  ],
)
def test_the_commonest_answer_is_that_of_training(test, reached):
  train = choices(*'bgghhi')
  assert guessing.constant(train, choices(*test)) == pytest.approx(reached)


def test_even_answers_are_hardly_above_a_guess():
  """On average over small tests with three candidates, a few to a set."""
  random = np.random.default_rng(0)

  def drawn(count):
    sets = random.integers(4, size=count)
    return [
      Example(
        '?', f'{one}{random.integers(3)}', tuple(f'{one}{i}' for i in range(3))
      )
      for one in sets
    ]

  reached = [guessing.constant(drawn(120), drawn(40)) for _ in range(100)]
  # The mean of max(right, guess) is above the guess by σ / √(2π), where the
  # part that is right has σ² = ⅓ · ⅔ / 40.
  above = (2 / 9 / 40 / 2 / np.pi) ** 0.5
  assert np.mean(reached) == pytest.approx(1 / 3 + above, abs=0.015)
