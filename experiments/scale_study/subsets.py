"""Which experts are merged: subsets that share the categories out evenly."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Subset(NamedTuple):
  """Categories whose experts are merged.

  Attributes:
    number: which of the subsets of this size it is.
    categories: in the order of the source.
  """

  number: int
  categories: tuple[str, ...]

  @property
  def name(self) -> str:
    """Unique within a seed: how many categories, and which subset of those."""
    return f'{len(self.categories)}.{self.number}'


def balanced(
  categories: Sequence[str], n: int, count: int, seed: int
) -> list[Subset]:
  """Draws subsets of `n` categories.

  Random subsets mostly measure whether a strong task was drawn. These are
  disjoint while there are categories left; then the same pairs are put together
  anew. Of more than half of the categories they are the complements of what
  would be drawn of the rest.

  Args:
    categories: all there are.
    n: how many of them a subset has.
    count: how many subsets, at most: there is one of all categories, and of few
      categories not many are even.
    seed: decides which categories go together, the same for all models.
  """
  order = np.random.default_rng(seed).permutation(len(categories)).tolist()
  rest = len(categories) - n
  if rest == 0:
    drawn = [set(order)]
  elif rest < n:
    drawn = [set(order) - left for left in _disjoint(order, rest, count)]
  else:
    drawn = _disjoint(order, n, count)
  return [
    Subset(number, tuple(categories[i] for i in sorted(chosen)))
    for number, chosen in enumerate(drawn)
  ]


def _disjoint(order: list[int], n: int, count: int) -> list[set[int]]:
  drawn: list[set[int]] = []
  for _ in range(count):
    blocks = range(0, len(order) - n + 1, n)
    for chosen in (set(order[start : start + n]) for start in blocks):
      if chosen not in drawn:
        drawn.append(chosen)
    pairs = [order[start : start + 2] for start in range(0, len(order), 2)]
    order = [i for pair in (*pairs[0::2], *pairs[1::2]) for i in pair]
  return drawn[:count]
