"""How answers are scored: by rank, word for word, or by common words."""

import collections
from collections.abc import Sequence
import re

import numpy as np

from experiments.scale_study.tasks.batches import Questions

_WORD = re.compile(r'\w+')


def is_right(
  questions: Questions, likelihoods: np.ndarray, greedy: np.ndarray
) -> np.ndarray:
  """Decides which examples are answered correctly.

  Rank classification (Sanh et al., 2022, arXiv 2110.08207) takes the candidate
  that the model finds most likely; a model that cannot tell, because two are
  equally likely or a likelihood is NaN, is wrong. Free text is right if greedy
  decoding would write exactly the answer: it departs from the answer at its
  first wrong token, so one forward pass over both decides.

  Args:
    questions: what was asked.
    likelihoods: log-likelihood of each candidate, [candidates].
    greedy: whether all of its tokens are the likeliest, bool [candidates].

  Returns:
    bool [examples].
  """
  examples = len(questions.dataset)
  best = np.full((2, examples), -np.inf)  # of wrong and of right candidates
  which = questions.right.astype(int), questions.example
  np.maximum.at(best, which, likelihoods)
  wrong, right = best
  is_text = np.bincount(questions.example, minlength=examples) == 1
  first = np.searchsorted(questions.example, np.arange(examples))
  return (right > wrong) & (greedy[first] | ~is_text)


def rouge_l(written: str, reference: str) -> float:
  """F-measure of the longest common subsequence of words.

  ROUGE-L (Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries")
  with equal weight of precision and recall, without case, punctuation or
  stemming. Texts are words with spaces between: a sentence of Chinese is one.

  Returns:
    From 0, no word in common, to 1, the same words in the same order, or the
    same text, which may have none.
  """
  if written.strip() == reference.strip():
    return 1.0
  ours, theirs = words(written), words(reference)
  common = _common_subsequence(ours, theirs)
  return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def words(text: str) -> list[str]:
  """Returns the words that `rouge_l` compares."""
  return _WORD.findall(text.lower())


def _common_subsequence(one: Sequence[str], two: Sequence[str]) -> int:
  """Length of the longest one.

  A bit for each word of `two`, as Hyyrö (2004, "Bit-Parallel LCS-length
  Computation Revisited") has it: chance compares some ten thousand pairs.
  """
  places = collections.defaultdict(int)
  for index, word in enumerate(two):
    places[word] |= 1 << index
  # Words of `two` that lengthen no common subsequence so far.
  rest = full = (1 << len(two)) - 1
  for word in one:
    found = rest & places[word]
    rest = ((rest + found) | (rest - found)) & full
  return len(two) - rest.bit_count()
