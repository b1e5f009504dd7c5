"""The tasks: answerable, with exact chance levels, disjoint splits."""

import itertools
import typing

import numpy as np
import pytest

from experiments.scale_study.tasks import corpus, encoding
from experiments.scale_study.tasks.dataset import Dataset, Split, split_of
from experiments.scale_study.tasks.held_in import HELD_IN

_DATASETS = tuple(itertools.chain(*HELD_IN.values()))
_LENGTH = 36

every_dataset = pytest.mark.parametrize(
  'dataset', _DATASETS, ids=lambda dataset: dataset.name
)


def _draw(dataset: Dataset, split: Split, count: int = 300, seed: int = 0):
  return list(itertools.islice(dataset.examples(split, seed), count))


@every_dataset
def test_answer_is_one_of_distinct_candidates(dataset):
  for example in _draw(dataset, 'train'):
    if example.candidates:
      assert example.answer in example.candidates
      assert len(set(example.candidates)) == len(example.candidates)
      assert all(len(word.split()) == 1 for word in example.candidates)


@every_dataset
def test_no_prompt_is_in_two_splits(dataset):
  prompts = {
    split: {example.prompt for example in _draw(dataset, split)}
    for split in typing.get_args(Split)
  }
  for one, two in itertools.combinations(prompts.values(), 2):
    assert one.isdisjoint(two)
  for split, drawn in prompts.items():
    assert {split_of(prompt) for prompt in drawn} == {split}


@every_dataset
def test_prompt_determines_the_answer(dataset):
  answers = {}
  for example in _draw(dataset, 'train', 1000):
    assert answers.setdefault(example.prompt, example.answer) == example.answer


@every_dataset
def test_seed_determines_the_examples(dataset):
  assert _draw(dataset, 'train', 20) == _draw(dataset, 'train', 20)
  assert _draw(dataset, 'train', 20) != _draw(dataset, 'train', 20, seed=1)


@every_dataset
def test_no_constant_answer_beats_chance(dataset):
  examples = _draw(dataset, 'train', 2000)
  constant = {
    word: np.mean([example.answer == word for example in examples])
    for word in {example.answer for example in examples}
  }
  chance = np.mean([example.chance for example in examples])
  assert max(constant.values()) < chance + 0.05


@every_dataset
def test_prompt_has_several_templates(dataset):
  openings = {
    (*example.prompt.split()[:1], *example.prompt.split()[-4:])
    for example in _draw(dataset, 'train')
  }
  assert len(openings) >= 3


@pytest.mark.parametrize(
  ('task', 'expected'),
  [
    ('sentiment', 1 / 2),
    ('topic', (1 / 6 + 1 / 2) / 2),
    ('structure_to_text', 0),
  ],
)
def test_chance_is_exact(task, expected):
  questions, chance = encoding.chosen_questions(
    HELD_IN[task], split='test', examples=40, length=_LENGTH
  )
  candidates = questions.candidates.sum(axis=1)
  guesses = np.divide(1, candidates, where=candidates > 0, out=np.zeros(40))
  assert chance == pytest.approx(expected) == pytest.approx(guesses.mean())


def test_replies_and_restatements_weigh_more():
  document = corpus.weigh('it was red . - what ? - it was red . so red .')
  heavy = [
    word
    for word, weight in zip(*document, strict=True)
    if weight == corpus.REPLY_WEIGHT
  ]
  assert heavy == 'it was red . red .'.split()


def test_pretraining_batches_cover_the_vocabulary():
  batches = encoding.pretraining_batches(
    steps=10, batch=50, length=_LENGTH, seed=3
  )
  assert batches.ids.shape == batches.weights.shape == (10, 50, _LENGTH)
  assert batches.ids.max() < len(encoding.vocabulary())
  assert not np.any(batches.weights[batches.ids == 0])


def test_only_answers_are_learned_in_fine_tuning():
  words = list(encoding.vocabulary())
  batches = encoding.fine_tuning_batches(
    HELD_IN['topic'], steps=2, batch=4, length=_LENGTH, seed=0
  )
  for ids, weights in zip(
    batches.ids.reshape(8, -1), batches.weights.reshape(8, -1), strict=True
  ):
    text = [words[index] for index in ids]
    learned = [words[index] for index in ids[weights > 0]]
    start = len(text) - text[::-1].index('answer') + 1
    assert learned == text[start : start + len(learned)]
    assert learned[-1] == '<end>'


def test_too_short_a_length_is_an_error():
  with pytest.raises(ValueError, match='choose a greater length'):
    encoding.fine_tuning_batches(
      HELD_IN['topic'], steps=1, batch=4, length=10, seed=0
    )
