"""What answers reach that do not look at the question."""

import collections
from collections.abc import Sequence
import itertools

from experiments.scale_study import metrics
from experiments.scale_study.tasks.source import Dataset, Example

# Answers that are tried. More of them hardly do better than the best of these,
# and each is compared with every reference.
_TRIED = 100


def constant(examples: Sequence[Example]) -> float:
  """What giving always the same answer reaches, or guessing if that is more.

  The same is the commonest answer among candidates that come again, less one
  time, for it must have been learned from another example.
  """
  answers = collections.defaultdict(collections.Counter)
  guessed = collections.defaultdict(float)
  for example in examples:
    same = frozenset(example.candidates)
    answers[same][example.answer] += 1
    guessed[same] += example.chance
  right = sum(
    max(guessed[same], max(found.values()) - 1)
    for same, found in answers.items()
  )
  return right / max(len(examples), 1)


def constant_rouge_l(dataset: Dataset, examples: int) -> float:
  """Mean ROUGE-L of the best answer that is always the same.

  It is one of a training example or, where there are none, of the test, where
  it does not count for its own.

  Args:
    dataset: of free text.
    examples: of the test that are asked, at most.
  """
  asked = [
    example.answer
    for example in itertools.islice(dataset.examples('test', 0), examples)
  ]
  learned = [
    example.answer
    for example in itertools.islice(dataset.examples('train', 0), _TRIED)
  ]
  return max(
    (sum(metrics.rouge_l(answer, one) for one in asked) - (not learned))
    / len(asked)
    for answer in {*(learned or asked[:_TRIED])}
  )
