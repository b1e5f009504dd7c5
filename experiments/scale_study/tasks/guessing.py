"""What answers reach that do not look at the question."""

import collections
from collections.abc import Mapping, Sequence
import itertools

from experiments.scale_study import metrics
from experiments.scale_study.tasks.source import Dataset, Example

# Answers that are tried. More of them hardly do better than the best of these,
# and each is compared with every reference.
_TRIED = 100


def constant(learned: Sequence[Example], asked: Sequence[Example]) -> float:
  """What giving always the same answer reaches, or guessing if that is more.

  Args:
    learned: training examples. The same is their commonest answer among the
      same candidates, and a guess among others.
    asked: of the test. Without training examples it is the commonest of these
      that comes again, less one time: it must be learned from another.
  """
  taught, answers = _by_candidates(learned), _by_candidates(asked)
  right = guessed = 0.0
  for same, found in answers.items():
    guess = found.total() / len(same) if same else 0.0
    most = max(found.values())
    if same in taught:
      ((commonest, _),) = taught[same].most_common(1)
      right += found[commonest]
    elif learned or most == 1:
      right += guess
    else:
      right += most - 1
    guessed += guess
  return max(right, guessed) / max(len(asked), 1)


def _by_candidates(
  examples: Sequence[Example],
) -> Mapping[frozenset[str], collections.Counter[str]]:
  answers = collections.defaultdict(collections.Counter)
  for example in examples:
    answers[frozenset(example.candidates)][example.answer] += 1
  return answers


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
