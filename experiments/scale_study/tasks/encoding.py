"""From words to arrays: the vocabulary, and batches for training and tests."""

from collections.abc import Iterable, Iterator, Sequence
import functools
import itertools
from typing import NamedTuple, TypeVar

import numpy as np

from experiments.scale_study.tasks.corpus import documents
from experiments.scale_study.tasks.dataset import Dataset, Example, Split
from experiments.scale_study.tasks.held_in import HELD_IN

T = TypeVar('T')

_PAD, _START, _END = '<pad>', '<start>', '<end>'

# Enough draws that no word can be missing: the rarest is in one draw of 50.
_VOCABULARY_DOCUMENTS = 2000
_VOCABULARY_EXAMPLES = 500


class Batches(NamedTuple):
  """Texts as ids, with the weight of each token in the loss.

  Attributes:
    ids: int32 [..., length].
    weights: float32 [..., length], 0 for padding and whatever is not learned.
  """

  ids: np.ndarray
  weights: np.ndarray


class Questions(NamedTuple):
  """Examples to be scored.

  Attributes:
    ids: prompts followed by their answers, int32 [examples, length].
    is_answer: True on the tokens of the answer, bool [examples, length].
    candidates: True for the ids among which to choose, bool [examples,
      vocabulary]; nowhere for free text.
  """

  ids: np.ndarray
  is_answer: np.ndarray
  candidates: np.ndarray


@functools.cache
def vocabulary() -> dict[str, int]:
  """Maps each word of the corpus and the tasks to its id."""
  words = set()
  for document in itertools.islice(documents(0), _VOCABULARY_DOCUMENTS):
    words.update(document.words)
  for dataset in itertools.chain(*HELD_IN.values()):
    drawn = dataset.examples('train', 0)
    for example in itertools.islice(drawn, _VOCABULARY_EXAMPLES):
      words.update(example.prompt.split(), example.answer.split())
      words.update(example.candidates)
  tokens = (_PAD, _START, _END, *sorted(words))
  return {token: index for index, token in enumerate(tokens)}


def pretraining_batches(
  *, steps: int, batch: int, length: int, seed: int
) -> Batches:
  """One document of the corpus per row: [steps, batch, length]."""
  ids, weights = [], []
  for document in itertools.islice(documents(seed), steps * batch):
    ids.append(_pad([_START, *document.words, _END], _PAD, length))
    weights.append(_pad([0.0, *document.weights, 1.0], 0.0, length))
  return Batches(
    _index(ids).reshape(steps, batch, length),
    np.array(weights, np.float32).reshape(steps, batch, length),
  )


def fine_tuning_batches(
  datasets: Sequence[Dataset],
  *,
  steps: int,
  batch: int,
  length: int,
  seed: int,
) -> Batches:
  """Fresh training examples of all datasets: [steps, batch, length].

  The datasets take turns; only tokens of answers have weight.
  """
  examples = itertools.islice(_in_turns(datasets, 'train', seed), steps * batch)
  ids, is_answer = _encode(examples, length)
  shape = (steps, batch, length)
  return Batches(
    ids.reshape(shape), is_answer.astype(np.float32).reshape(shape)
  )


def chosen_questions(
  datasets: Sequence[Dataset], *, split: Split, examples: int, length: int
) -> tuple[Questions, float]:
  """Draws the examples on which models are scored.

  They do not depend on the seed of a run: every run answers the same ones.

  Returns:
    The questions and the exact accuracy of guessing uniformly on them.
  """
  drawn = list(itertools.islice(_in_turns(datasets, split, 0), examples))
  index = vocabulary()
  ids, is_answer = _encode(drawn, length)
  candidates = np.zeros((examples, len(index)), bool)
  for row, example in enumerate(drawn):
    candidates[row, [index[word] for word in example.candidates]] = True
  chance = sum(example.chance for example in drawn) / examples
  return Questions(ids, is_answer, candidates), chance


def _in_turns(
  datasets: Sequence[Dataset], split: Split, seed: int
) -> Iterator[Example]:
  sources = (dataset.examples(split, seed) for dataset in datasets)
  return itertools.chain.from_iterable(zip(*sources, strict=True))


def _encode(
  examples: Iterable[Example], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns ids, int32, and where the answer is, bool: [examples, length]."""
  ids, is_answer = [], []
  for example in examples:
    prompt = [_START, *example.prompt.split()]
    answer = [*example.answer.split(), _END]
    ids.append(_pad(prompt + answer, _PAD, length))
    of_answer = len(prompt) * [False] + len(answer) * [True]
    is_answer.append(_pad(of_answer, False, length))
  return _index(ids), np.array(is_answer)


def _pad(row: list[T], filler: T, length: int) -> list[T]:
  if len(row) > length:
    raise ValueError(
      f'A text has {len(row)} tokens, more than {length}: choose a greater '
      f'length. It is {row}.'
    )
  return row + (length - len(row)) * [filler]


def _index(rows: list[list[str]]) -> np.ndarray:
  index = vocabulary()
  return np.array([[index[token] for token in row] for row in rows], np.int32)
