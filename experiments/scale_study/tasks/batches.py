"""From text to arrays: batches for training, questions for scoring."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import itertools
from typing import NamedTuple

import numpy as np

from experiments.scale_study.tasks.source import (
  Dataset,
  Example,
  Source,
  Split,
)
from experiments.scale_study.tasks.tokenizer import Tokenizer

_WANTED_FOR: Mapping[Split, str] = {
  'train': 'models are trained on them',
  'validation': 'merge hyperparameters are chosen on them',
  'test': 'models are judged on them',
}

# Ids, int32, and the weight of each in the loss, float32: [batch, length].
# Padding, and whatever is not to be learned, weighs 0.
Batch = tuple[np.ndarray, np.ndarray]


class Questions(NamedTuple):
  """Examples to be scored in one forward pass over `ids`.

  A model's answer is the candidate whose tokens it finds most likely, or, where
  an example has one candidate only, the reference: what greedy decoding must
  write. Candidates of one token share a row, since the logits in front of them
  are the same.

  Attributes:
    ids: prompts followed by an answer, int32 [rows, length].
    row: the row of each candidate, int32 [candidates].
    position: where its tokens are predicted, int32 [candidates, tokens].
    token: its tokens, int32 [candidates, tokens].
    weight: 1 for tokens, 0 for padding, float32 [candidates, tokens].
    example: the example it belongs to, ascending, int32 [candidates].
    right: whether it is the answer, bool [candidates].
    dataset: index of the dataset of each example, int32 [examples].
    chance: accuracy of a uniform guess, float32 [examples].
  """

  ids: np.ndarray
  row: np.ndarray
  position: np.ndarray
  token: np.ndarray
  weight: np.ndarray
  example: np.ndarray
  right: np.ndarray
  dataset: np.ndarray
  chance: np.ndarray


def corpus_batches(
  source: Source, *, batch: int, length: int, seed: int
) -> Iterator[Batch]:
  """Yields rows of the corpus forever: its texts end to end, cut to `length`.

  Every text opens with a start token, which is not learned.
  """
  size = batch * length
  ids: list[int] = []
  weights: list[float] = []
  for text in source.corpus(seed):
    ids.append(source.tokenizer.start)
    weights.append(0.0)
    for piece in text:
      tokens = source.tokenizer.encode(piece.text)
      ids.extend(tokens)
      weights.extend(len(tokens) * [piece.weight])
    while len(ids) >= size:
      yield (
        np.array(ids[:size], np.int32).reshape(batch, length),
        np.array(weights[:size], np.float32).reshape(batch, length),
      )
      del ids[:size], weights[:size]


def example_batches(
  datasets: Sequence[Dataset],
  tokenizer: Tokenizer,
  *,
  batch: int,
  length: int,
  seed: int,
) -> Iterator[Batch]:
  """Yields training examples forever; the datasets take turns.

  Only the tokens of answers, and the end after them, have weight.

  Raises:
    ValueError: if a dataset has no training examples, or one is too long.
  """
  for dataset in datasets:
    _demand_any(dataset, 'train')
  sources = [dataset.examples('train', seed) for dataset in datasets]
  turns = itertools.cycle(sources)
  while True:
    ids = np.full((batch, length), tokenizer.pad, np.int32)
    weights = np.zeros((batch, length), np.float32)
    for row, turn in enumerate(itertools.islice(turns, batch)):
      example = next(turn)
      prompt, answer = _encode(tokenizer, example)
      stop = len(prompt) + len(answer)
      _demand_room(stop, example, length)
      ids[row, :stop] = prompt + answer
      weights[row, len(prompt) : stop] = 1.0
    yield ids, weights


def demand(
  datasets: Sequence[Dataset],
  tokenizer: Tokenizer,
  *,
  split: Split,
  examples: int,
  length: int,
) -> None:
  """Raises ValueError if a dataset has no examples, or some do not fit.

  Args:
    datasets: what to look at.
    tokenizer: of the source.
    split: of the examples; what is not trained on has to fit with each of its
      candidates.
    examples: how many of each dataset are looked at, at most; of a pool all
      are, since a seed may draw any of them.
    length: tokens of a row.
  """
  for dataset in datasets:
    _demand_any(dataset, split)
    drawn = itertools.islice(dataset.examples(split, 0), examples)
    looked_at = split == 'train' and dataset.pool or [*drawn]
    tokens = [_tokens(tokenizer, example, split) for example in looked_at]
    if max(tokens) > length:
      long = [i for i, count in enumerate(tokens) if count > length]
      raise ValueError(
        f'{len(long)} of {len(tokens)} {split} examples of {dataset.category}/'
        f'{dataset.name} have up to {max(tokens)} tokens, more than {length}: '
        f'choose a greater length, as by --set=length={max(tokens)}, or leave '
        f'them out of the data. One is {_cut(looked_at[long[0]])}'
      )


def _tokens(tokenizer: Tokenizer, example: Example, split: Split) -> int:
  """Length of a row, of what is not trained on with its longest candidate."""
  if split == 'train':
    return sum(map(len, _encode(tokenizer, example)))
  return max(
    position + 1 + len(token)
    for _, position, token, _ in _candidates(tokenizer, example)
  )


def _demand_any(dataset: Dataset, split: Split) -> None:
  if not dataset.has(split):
    raise ValueError(
      f'{dataset.category}/{dataset.name} has no {split} examples: '
      f'{_WANTED_FOR[split]}. Put some of the others aside, or leave the '
      'dataset out.'
    )


def questions(
  datasets: Sequence[Dataset],
  tokenizer: Tokenizer,
  *,
  split: Split,
  examples: int,
  length: int,
) -> Questions:
  """Draws the examples on which models are scored.

  They do not depend on the seed of a run: every run answers the same ones.

  Args:
    datasets: what to ask.
    tokenizer: of the source.
    split: 'validation' or 'test'.
    examples: how many of each dataset, at most.
    length: tokens of a row.
  """
  rows, candidates, dataset_of, chance = [], [], [], []
  for index, dataset in enumerate(datasets):
    for example in itertools.islice(dataset.examples(split, 0), examples):
      for row, position, token, right in _candidates(tokenizer, example):
        _demand_room(position + 1 + len(token), example, length)
        if row is not None:
          rows.append(row)
        candidates.append(
          (len(rows) - 1, position, token, len(dataset_of), right)
        )
      dataset_of.append(index)
      chance.append(example.chance)
  width = max(len(token) for _, _, token, _, _ in candidates)
  row, position, token, example, right = zip(*candidates, strict=True)
  return Questions(
    ids=_padded(rows, length, tokenizer.pad),
    row=np.array(row, np.int32),
    position=np.array(position, np.int32)[:, None]
    + np.arange(width, dtype=np.int32),
    token=_padded(token, width, tokenizer.pad),
    weight=np.array(
      [[float(i < len(t)) for i in range(width)] for t in token], np.float32
    ),
    example=np.array(example, np.int32),
    right=np.array(right),
    dataset=np.array(dataset_of, np.int32),
    chance=np.array(chance, np.float32),
  )


def _candidates(
  tokenizer: Tokenizer, example: Example
) -> Iterator[tuple[list[int] | None, int, list[int], bool]]:
  """Yields a new row or None, where it predicts what, and if that is right."""
  prompt, answer = _encode(tokenizer, example)
  if not example.candidates:
    yield prompt + answer, len(prompt) - 1, answer, True
    return
  tokens = [
    tokenizer.encode(_after(example.prompt, text))
    for text in example.candidates
  ]
  single = all(len(token) == 1 for token in tokens)
  for index, (text, token) in enumerate(
    zip(example.candidates, tokens, strict=True)
  ):
    # Without its end, a candidate that opens another would be likelier.
    token = token if single else [*token, tokenizer.end]
    row = prompt + token if index == 0 or not single else None
    yield row, len(prompt) - 1, token, text == example.answer


def _encode(
  tokenizer: Tokenizer, example: Example
) -> tuple[list[int], list[int]]:
  prompt = [tokenizer.start, *tokenizer.encode(example.prompt)]
  text = _after(example.prompt, example.answer)
  answer = [*tokenizer.encode(text), tokenizer.end]
  return prompt, answer


def _after(prompt: str, text: str) -> str:
  """What follows a prompt: a word of its own, also where parts of words count.

  To a model's own tokenizer 'Good?yes' is other tokens than 'Good? yes'.
  """
  apart = prompt[-1:].isspace() or text[:1].isspace()
  return text if apart else f' {text}'


def _demand_room(tokens: int, example: Example, length: int) -> None:
  if tokens > length:
    raise ValueError(
      f'An example has {tokens} tokens, more than {length}: choose a greater '
      f'length, as by --set=length={tokens}, or leave long examples out of the '
      f'data. It is {_cut(example)}'
    )


def _cut(example: Example) -> str:
  text = f'{example}.'
  return text if len(text) <= 300 else f'{text[:300].rstrip()} ...'


def _padded(
  rows: Iterable[Sequence[int]], length: int, filler: int
) -> np.ndarray:
  rows = list(rows)
  padded = np.full((len(rows), length), filler, np.int32)
  for index, row in enumerate(rows):
    padded[index, : len(row)] = row
  return padded
