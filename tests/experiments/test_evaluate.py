"""Scoring, against cases decided by hand."""

import jax.numpy as jnp
import numpy as np

from experiments.scale_study.evaluate import is_correct
from experiments.scale_study.tasks.encoding import Questions

_VOCABULARY = 6


def _logits(*favorites: dict[int, float]) -> jnp.ndarray:
  """Logits of one example: by position, {id: logit}, 0 for other ids."""
  logits = np.zeros((1, len(favorites), _VOCABULARY), np.float32)
  for position, favorite in enumerate(favorites):
    for index, value in favorite.items():
      logits[0, position, index] = value
  return jnp.asarray(logits)


def _question(answer: list[int], candidates: list[int]) -> Questions:
  """A prompt of two tokens, 1 and 1, and its answer."""
  mask = np.zeros((1, _VOCABULARY), bool)
  mask[0, candidates] = True
  return Questions(
    ids=np.array([[1, 1, *answer]], np.int32),
    is_answer=np.array([[False, False, *(len(answer) * [True])]]),
    candidates=mask,
  )


def test_rank_classification_ignores_what_is_no_candidate():
  question = _question([3, 2], candidates=[3, 4])
  # Id 5 is the likeliest next word, but it is not among the answers.
  assert is_correct(_logits({}, {5: 9, 3: 2, 4: 1}, {}, {}), question)
  assert not is_correct(_logits({}, {5: 9, 3: 1, 4: 2}, {}, {}), question)


def test_rank_classification_reads_the_last_word_of_the_prompt():
  question = _question([3, 2], candidates=[3, 4])
  assert not is_correct(_logits({3: 9}, {4: 1}, {3: 9}, {3: 9}), question)


def test_free_text_must_match_to_its_end():
  question = _question([3, 4, 2], candidates=[])
  assert is_correct(_logits({5: 1}, {3: 1}, {4: 1}, {2: 1}, {}), question)
  assert not is_correct(_logits({5: 1}, {3: 1}, {4: 1}, {5: 1}, {}), question)
  assert not is_correct(_logits({5: 1}, {5: 1}, {4: 1}, {2: 1}, {}), question)
