"""From text to arrays."""

import itertools

import numpy as np
import pytest

from experiments.scale_study.tasks import batches, procedural
from experiments.scale_study.tasks.source import (
  Dataset,
  Example,
  Piece,
  Source,
)
from experiments.scale_study.tasks.tokenizer import Tokenizer

_TOKENIZER = Tokenizer('a b c d e f ? !'.split())
# Sorted: ! ? a b c d e f from id 3 on.
_BANG, _ASK, _A, _B, _C, _D, _E, _F = range(3, 11)
_START, _END = Tokenizer.start, Tokenizer.end


def _dataset(*examples):
  return Dataset(
    'letters', 'sentiment', 'accuracy', lambda *_: itertools.cycle(examples)
  )


def test_only_answers_and_their_ends_are_learned():
  made = batches.example_batches(
    [_dataset(Example('a b ?', 'c d')), _dataset(Example('e', 'f'))],
    _TOKENIZER,
    batch=3,
    length=8,
    seed=0,
  )
  one = [_START, _A, _B, _ASK, _C, _D, _END, 0]
  two = [_START, _E, _F, _END, 0, 0, 0, 0]
  of_one, of_two = [0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0]
  # The turns go on over the batches.
  for ids, weights in (
    ([one, two, one], [of_one, of_two, of_one]),
    ([two, one, two], [of_two, of_one, of_two]),
  ):
    np.testing.assert_equal(next(made), (np.array(ids), np.array(weights)))


def test_texts_of_the_corpus_follow_each_other():
  source = Source(
    held_in={},
    held_out={},
    instruction=(),
    corpus=lambda seed: itertools.repeat((Piece('a ?'), Piece('b', 5.0))),
    tokenizer=_TOKENIZER,
  )
  made = batches.corpus_batches(source, batch=2, length=3, seed=0)
  rows = [
    ([[_START, _A, _ASK], [_B, _START, _A]], [[0, 1, 1], [5, 0, 1]]),
    ([[_ASK, _B, _START], [_A, _ASK, _B]], [[1, 5, 0], [1, 1, 5]]),
  ]
  for ids, weights in rows:
    np.testing.assert_equal(next(made), (np.array(ids), np.array(weights)))


def _questions(*examples):
  return batches.questions(
    [Dataset('letters', 'sentiment', 'accuracy', lambda *_: iter(examples))],
    _TOKENIZER,
    split='test',
    examples=9,
    length=8,
  )


def test_candidates_of_one_token_share_a_row():
  made = _questions(Example('a ?', 'c', ('b', 'c')))
  np.testing.assert_array_equal(made.ids, [[_START, _A, _ASK, _B, 0, 0, 0, 0]])
  np.testing.assert_array_equal(made.row, [0, 0])
  # The question mark, at 2, predicts the candidate.
  np.testing.assert_array_equal(made.position, [[2], [2]])
  np.testing.assert_array_equal(made.token, [[_B], [_C]])
  np.testing.assert_array_equal(made.right, [False, True])
  np.testing.assert_array_equal(made.chance, [0.5])


def test_longer_candidates_have_rows_and_ends():
  made = _questions(Example('a', 'c d', ('b', 'c d')))
  np.testing.assert_array_equal(
    made.ids[:, :5], [[_START, _A, _B, _END, 0], [_START, _A, _C, _D, _END]]
  )
  np.testing.assert_array_equal(made.row, [0, 1])
  np.testing.assert_array_equal(made.position, [[1, 2, 3], [1, 2, 3]])
  np.testing.assert_array_equal(made.token, [[_B, _END, 0], [_C, _D, _END]])
  np.testing.assert_array_equal(made.weight, [[1, 1, 0], [1, 1, 1]])


def test_free_text_is_its_only_candidate():
  made = _questions(Example('a', 'b'), Example('a b', 'c d'))
  np.testing.assert_array_equal(made.example, [0, 1])
  np.testing.assert_array_equal(made.right, [True, True])
  np.testing.assert_array_equal(made.token, [[_B, _END, 0], [_C, _D, _END]])
  np.testing.assert_array_equal(made.chance, [0, 0])


class _Characters:
  """A tokenizer that sees white space, as those of large models do."""

  pad, start, end, size = 0, 1, 2, 128

  def encode(self, text):
    return [*text.encode()]

  def text(self, ids):
    return bytes(i for i in ids if i > self.end).decode()


@pytest.mark.parametrize(
  'prompt, answer, expected',
  [
    ('good ?', 'yes', 'good ? yes'),
    ('good ?\n', 'yes', 'good ?\nyes'),
    ('good ?', ' yes', 'good ? yes'),
  ],
)
def test_an_answer_is_a_word_of_its_own(prompt, answer, expected):
  tokenizer, space = _Characters(), answer.removesuffix('yes')
  example = Example(prompt, answer, (answer, f'{space}no'))
  ids, weights = next(
    batches.example_batches(
      [_dataset(example)], tokenizer, batch=1, length=16, seed=0
    )
  )
  assert tokenizer.text(ids[0]) == expected
  assert tokenizer.text(ids[weights > 0]) == expected.removeprefix(prompt)
  made = batches.questions(
    [Dataset('good', 'sentiment', 'accuracy', lambda *_: iter([example]))],
    tokenizer,
    split='test',
    examples=1,
    length=16,
  )
  assert [*map(tokenizer.text, made.ids)] == [
    expected,
    expected.replace('yes', 'no'),
  ]


def test_every_position_predicts_its_token():
  """Of all datasets, where a row holds the candidate it is read from."""
  source = procedural.source()
  made = batches.questions(
    [d for datasets in source.categories.values() for d in datasets],
    source.tokenizer,
    split='test',
    examples=20,
    length=48,
  )
  alone = np.bincount(made.row)[made.row] == 1
  following = made.ids[made.row[:, None], made.position + 1]
  np.testing.assert_array_equal(
    np.where(made.weight, following, 0)[alone], made.token[alone]
  )
  assert list(np.bincount(made.dataset)) == 23 * [20]
  # One candidate of each example is right.
  np.testing.assert_array_equal(
    np.bincount(made.example, weights=made.right), np.ones(23 * 20)
  )


def test_too_short_a_length_is_an_error():
  with pytest.raises(ValueError, match='has 4 tokens, more than 3'):
    next(
      batches.example_batches(
        [_dataset(Example('a', 'b'))], _TOKENIZER, batch=1, length=3, seed=0
      )
    )


def test_all_that_are_too_long_are_counted():
  """With a start and an end, and the longest candidate of what is asked."""
  examples = [
    Example('a b', 'c', ('c', 'd')),
    Example('a ' * 199, 'c', ('c', 'd')),
    Example('a', 'b', ('b', 'c d e f')),
  ]
  letters = Dataset(
    'letters', 'sentiment', 'accuracy', lambda *_: iter(examples), examples
  )
  for split, message in (
    ('train', '1 of 3 train examples of sentiment/letters have up to 202 '),
    ('test', '2 of 3 test examples of sentiment/letters have up to 201 '),
  ):
    with pytest.raises(ValueError, match=message) as error:
      batches.demand([letters], _TOKENIZER, split=split, examples=9, length=6)
    assert 'tokens, more than 6: ' in str(error.value)
    assert f'--set=length={message.split()[-1]}, ' in str(error.value)
    assert str(error.value).endswith(' a a a ...')
    assert len(str(error.value)) < 600


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_a_split_without_examples_is_an_error(split):
  with pytest.raises(ValueError, match=f'sentiment/letters has no {split}'):
    batches.demand([_dataset()], _TOKENIZER, split=split, examples=9, length=8)


def test_an_unknown_word_is_an_error_without_spelling():
  with pytest.raises(ValueError, match="'wolf' is not among the 8"):
    _TOKENIZER.encode('a wolf')


def test_spelling_returns_what_was_spelled():
  tokenizer = Tokenizer(['the', '.'], spell=True)
  ids = tokenizer.encode('the wolf, naïve.')
  assert max(ids) < tokenizer.size == 3 + 256 + 2
  assert tokenizer.decode(ids) == 'the wolf , naïve .'
  assert tokenizer.decode([*ids[:1], tokenizer.end, *ids]) == 'the'


@pytest.mark.parametrize('spell', [False, True])
def test_ids_that_only_fill_up_the_vocabulary_say_nothing(spell):
  tokenizer = Tokenizer(['the', 'wolf'], spell=spell)
  one, two = tokenizer.encode('the wolf')
  filler = [tokenizer.size, tokenizer.size + 9]
  assert tokenizer.decode([one, *filler, two, filler[0]]) == 'the wolf'
