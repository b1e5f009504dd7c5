"""Texts of many tasks in groups for one forward pass each.

Texts of about the same length are put together, whatever their task, and
logits are computed for so many tokens as the texts that are asked the most
about have: small models spend their time on padding otherwise.
"""

from collections.abc import Iterator, Sequence
import math
from typing import NamedTuple

import numpy as np

from experiments.scale_study.tasks.batches import Questions

# Texts in a forward pass.
ROWS = 64
# Each length is a program of its own: there are so many, in steps of 8 or more.
_LENGTHS = 8


class Group(NamedTuple):
  """Texts of one forward pass, and what is asked about them.

  Attributes:
    ids: the texts, int32 [ROWS, length].
    asked: row, position and token of each place, int32 [3, places].
    index: which of all places the first of these are, int64 [n <= places].
  """

  ids: np.ndarray
  asked: np.ndarray
  index: np.ndarray


def most_places(questions: Sequence[Questions]) -> int:
  """Returns how many places there are about `ROWS` texts at most."""
  return ROWS * max(np.bincount(_asked(q)[0]).max() for q in questions)


def groups(questions: Sequence[Questions], places: int) -> Iterator[Group]:
  """Puts texts together.

  Args:
    questions: of each task; all ids are of one length.
    places: of a group.
  """
  ids = np.concatenate([q.ids for q in questions])
  before = np.cumsum([0, *(len(q.ids) for q in questions)])
  asked = np.concatenate(
    [
      _asked(q) + [[first], [0], [0]]
      for q, first in zip(questions, before[:-1], strict=True)
    ],
    axis=1,
  )
  row, position, _ = asked
  read = np.zeros(len(ids), np.int64)
  np.maximum.at(read, row, position + 1)
  shortest_first = np.argsort(read, kind='stable')
  rank = np.argsort(shortest_first)
  step = 8 * math.ceil(ids.shape[1] / (8 * _LENGTHS))
  for first in range(0, len(ids), ROWS):
    texts = shortest_first[first : first + ROWS]
    length = min(-(-read[texts].max() // step) * step, ids.shape[1])
    index = np.flatnonzero(rank[row] // ROWS == first // ROWS)
    group = asked[:, index]
    group[0] = rank[group[0]] - first
    yield Group(
      ids=padded(ids[texts, :length], ROWS),
      asked=padded(group.T, places).T.astype(np.int32),
      index=index,
    )


def padded(array: np.ndarray, rows: int) -> np.ndarray:
  """Adds rows of zeros."""
  return np.pad(array, [(0, rows - len(array)), *([(0, 0)] * (array.ndim - 1))])


def _asked(questions: Questions) -> np.ndarray:
  """Row, position and token of what has weight, candidate by candidate."""
  learned = questions.weight > 0
  row = np.broadcast_to(questions.row[:, None], learned.shape)
  places = (row, questions.position, questions.token)
  return np.stack([place[learned] for place in places])
