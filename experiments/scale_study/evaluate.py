"""Scoring: rank classification where there are candidates, else exact match.

Rank classification (Sanh et al., 2022, arXiv 2110.08207) takes the candidate
that the model finds most likely; candidates are single words here. Free text
is right if greedy decoding would write exactly the answer. Greedy decoding
departs from the answer at its first wrong token, so that one forward pass over
prompt and answer decides it.
"""

from collections.abc import Mapping
import functools

import jax
import jax.numpy as jnp

from experiments.scale_study import model
from experiments.scale_study.model import ModelConfig, Params
from experiments.scale_study.tasks.encoding import Questions


def is_correct(logits: jax.Array, questions: Questions) -> jax.Array:
  """Decides which questions are answered correctly.

  Args:
    logits: of the next token at every position, [examples, length, vocabulary].
    questions: the same examples.

  Returns:
    bool [examples].
  """
  ids, is_answer = questions.ids[:, 1:], questions.is_answer[:, 1:]
  logits = logits[:, :-1]
  exact = jnp.all((logits.argmax(-1) == ids) | ~is_answer, axis=1)

  first = is_answer.argmax(axis=1)[:, None]
  first_logits = jnp.take_along_axis(logits, first[..., None], axis=1)[:, 0]
  ranked = jnp.where(questions.candidates, first_logits, -jnp.inf).argmax(-1)
  right = ranked == jnp.take_along_axis(ids, first, axis=1)[:, 0]
  return jnp.where(questions.candidates.any(axis=-1), right, exact)


@functools.partial(jax.jit, static_argnames='config')
def accuracy(
  config: ModelConfig, params: Params, questions: Questions
) -> jax.Array:
  """Returns the fraction of questions answered correctly."""
  logits = model.logits(config, params, questions.ids)
  return jnp.mean(is_correct(logits, questions))


def evaluate(
  config: ModelConfig, params: Params, tests: Mapping[str, Questions]
) -> dict[str, float]:
  """Returns the accuracy on every task, by name."""
  return {
    task: float(accuracy(config, params, questions))
    for task, questions in tests.items()
  }
