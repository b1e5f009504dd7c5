"""Datasets of generated examples, split by their prompts."""

from collections.abc import Callable, Iterator
import random

from experiments.scale_study.tasks.source import (
  Dataset,
  Example,
  Metric,
  Split,
)
from experiments.scale_study.tasks.splits import split_of

Draw = Callable[[random.Random], Example]

# After so many repetitions a space of prompts counts as exhausted.
_PATIENCE = 1000


def drawn(
  name: str,
  category: str,
  draw: Draw,
  *,
  metric: Metric = 'accuracy',
  split_of: Callable[[str], Split] = split_of,
) -> Dataset:
  """Makes a dataset of what `draw` generates.

  Args:
    name: of the dataset.
    category: of the dataset.
    draw: generates one example.
    metric: how answers are scored.
    split_of: tells the split of a prompt.

  Returns:
    A dataset whose training examples are fresh at every step.
  """

  def examples(split: Split, seed: int) -> Iterator[Example]:
    rng = random.Random(f'{name}/{split}/{seed}')
    seen: set[str] = set()
    repetitions = 0
    while repetitions < _PATIENCE:
      example = draw(rng)
      if split_of(example.prompt) != split:
        continue
      if split == 'train':
        yield example
      elif example.prompt in seen:
        repetitions += 1
      else:
        repetitions = 0
        seen.add(example.prompt)
        yield example

  return Dataset(name, category, metric, examples)
