"""The micro-world: right labels, disjoint splits, exact chance, no leaks."""

import itertools
import re
import typing

import numpy as np
import pytest

from experiments.scale_study.configs import full
from experiments.scale_study.tasks import procedural
from experiments.scale_study.tasks.procedural import answering, lexicon, world
from experiments.scale_study.tasks.source import (
  Dataset,
  HELD_IN,
  HELD_OUT,
  Split,
)
from experiments.scale_study.tasks.splits import split_of
from tests.experiments import procedural_reader

_SOURCE = procedural.source()
_CATEGORIES = tuple(itertools.chain(*_SOURCE.categories.values()))
_ALL = (*_CATEGORIES, *_SOURCE.instruction)

every_dataset = pytest.mark.parametrize(
  'dataset', _ALL, ids=lambda dataset: dataset.name
)


def _draw(dataset: Dataset, split: Split, count: int = 200, seed: int = 0):
  return list(itertools.islice(dataset.examples(split, seed), count))


def _documents(seed: int, count: int = 1000):
  return list(itertools.islice(_SOURCE.corpus(seed), count))


def test_the_categories_are_those_of_the_study():
  assert tuple(_SOURCE.held_in) == HELD_IN
  assert tuple(_SOURCE.held_out) == HELD_OUT
  assert {len(datasets) for datasets in _SOURCE.held_in.values()} == {2}
  assert sum(map(len, _SOURCE.held_out.values())) == 7
  assert len(_SOURCE.instruction) == 12
  assert len({dataset.name for dataset in _ALL}) == len(_ALL)
  for category, datasets in _SOURCE.categories.items():
    assert {dataset.category for dataset in datasets} == {category}
    assert {d.held_in for d in datasets} == {category in HELD_IN}


@every_dataset
def test_the_answer_is_what_a_reader_finds(dataset):
  for example in _draw(dataset, 'train') + _draw(dataset, 'test'):
    assert procedural_reader.answer(dataset.name, example.prompt) == (
      example.answer
    ), example


@every_dataset
def test_candidates_are_distinct_and_hold_the_answer(dataset):
  ranked = dataset.metric == 'accuracy'
  for example in _draw(dataset, 'train'):
    assert bool(example.candidates) == ranked
    assert len(set(example.candidates)) == len(example.candidates)
    if ranked:
      assert example.answer in example.candidates
      assert example.chance == 1 / len(example.candidates)


@every_dataset
def test_no_constant_answer_beats_chance(dataset):
  examples = _draw(dataset, 'train', 2000)
  frequencies = np.unique(
    [example.answer for example in examples], return_counts=True
  )[1] / len(examples)
  chance = np.mean([example.chance for example in examples])
  # Of free text, no answer is more frequent than 1 in 8.
  assert frequencies.max() < max(chance, 1 / 8) + 0.04


@every_dataset
def test_no_prompt_is_in_two_splits(dataset):
  prompts = {
    split: {example.prompt for example in _draw(dataset, split)}
    for split in typing.get_args(Split)
  }
  assert all(prompts.values())
  for one, two in itertools.combinations(prompts.values(), 2):
    assert one.isdisjoint(two)


@pytest.mark.parametrize('split', ['validation', 'test'])
@every_dataset
def test_examples_for_scoring_are_distinct(dataset, split):
  prompts = [example.prompt for example in _draw(dataset, split)]
  assert len(set(prompts)) == len(prompts)


@every_dataset
def test_examples_are_fresh_and_reproducible(dataset):
  assert _draw(dataset, 'train', 30) == _draw(dataset, 'train', 30)
  assert _draw(dataset, 'train', 30) != _draw(dataset, 'train', 30, seed=1)


@every_dataset
def test_there_are_several_templates(dataset):
  templates = {
    procedural_reader.template(example.prompt)
    for example in _draw(dataset, 'train', 500)
  }
  assert len(templates) >= 3


def test_instruction_shares_no_template_with_the_categories():
  instruction, categories = (
    {
      procedural_reader.question_template(example.prompt)
      for dataset in datasets
      for example in _draw(dataset, 'train', 500)
    }
    for datasets in (_SOURCE.instruction, _CATEGORIES)
  )
  assert instruction.isdisjoint(categories)


def test_instruction_has_no_sentence():
  for dataset in _SOURCE.instruction:
    for example in _draw(dataset, 'train'):
      for items in re.findall(
        r'(?:list|words?|name) : (.*?) \.', example.prompt
      ):
        assert all(' ' not in item for item in items.split(' , '))


def test_every_word_has_an_id_and_every_text_fits():
  tokenizer = _SOURCE.tokenizer
  assert 350 <= tokenizer.size <= 420
  for document in _documents(seed=7):
    text = ' '.join(piece.text for piece in document)
    # The start token is one more.
    assert len(tokenizer.encode(text)) < full.CONFIG.corpus_length
  for dataset in _ALL:
    for example in _draw(dataset, 'test') + _draw(dataset, 'train', seed=7):
      answers = (example.answer, *example.candidates)
      longest = max(len(tokenizer.encode(answer)) for answer in answers)
      needed = len(tokenizer.encode(example.prompt)) + longest + 2
      assert needed <= full.CONFIG.length


def test_every_fact_is_tested_in_a_wording_that_training_lacks():
  split_of_wording = {
    (fact, question): answering.split_of_recall(f'{question} ? answer :')
    for fact in world.FACTS
    for question in fact.questions
  }
  for fact in world.FACTS:
    splits = [split_of_wording[fact, question] for question in fact.questions]
    assert sorted(splits) == ['test', 'train', 'validation']
  # Nor are all facts of a relation tested in the same wording.
  for relation in lexicon.RELATIONS:
    tested = {
      fact.questions.index(question)
      for (fact, question), split in split_of_wording.items()
      if fact.relation == relation and split == 'test'
    }
    assert tested == {0, 1, 2}


def test_the_corpus_has_no_answer_format():
  words = {
    word
    for document in _documents(seed=0, count=3000)
    for piece in document
    for word in piece.text.split()
  }
  assert words.isdisjoint({'answer', ':', 'options', 'choose', 'question'})


def test_replies_and_restatements_weigh_five_times_as_much():
  for document in _documents(seed=0):
    before = ''
    for piece in document:
      heavy = before.endswith('? -') or before == 'so'
      assert piece.weight == (5.0 if heavy else 1.0)
      before = piece.text


def test_the_corpus_is_fresh_and_reproducible():
  assert _documents(0, 20) == _documents(0, 20)
  assert _documents(0, 20) != _documents(1, 20)


def test_a_part_has_what_its_categories_need():
  part = procedural.source(('sentiment', 'topic_classification'))
  assert list(part.held_in) == ['sentiment', 'topic_classification']
  assert not part.held_out and not part.instruction
  assert part.tokenizer.size < _SOURCE.tokenizer.size
  for document in itertools.islice(part.corpus(5), 500):
    for piece in document:
      part.tokenizer.encode(piece.text)


def test_an_unknown_category_is_an_error():
  with pytest.raises(ValueError, match='sentimant are no held-in categories'):
    procedural.source(('sentimant',))


def test_one_subject_in_ten_is_for_validation_and_for_testing():
  splits = [split_of(f'subject {index}') for index in range(5000)]
  assert np.mean([s == 'test' for s in splits]) == pytest.approx(0.1, abs=0.02)
  assert np.mean([s == 'validation' for s in splits]) == pytest.approx(
    0.1, abs=0.02
  )
