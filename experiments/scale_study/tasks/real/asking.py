"""How a chat model is asked, so that an answer is a single token.

The assistant's turn is begun for it; what comes next is the answer, with the
space in front that a word within a text has. Candidates of one token share one
forward pass.
"""

from collections.abc import Sequence
import random

from experiments.scale_study import smollm2
from experiments.scale_study.tasks.source import Example


def asked(
  question: str,
  answer: str,
  candidates: Sequence[str],
  *,
  opening: str = 'Answer:',
) -> Example:
  """An example in the format of the chat; the tokenizer adds its first token.

  Args:
    question: what the user says.
    answer: one of the candidates.
    candidates: words to choose from.
    opening: how the assistant's turn begins.
  """
  prompt = f'user\n{question}{smollm2.END}\n{smollm2.START}assistant\n{opening}'
  return Example(prompt, f' {answer}', tuple(f' {word}' for word in candidates))


def listed(rng: random.Random, options: Sequence[str]) -> str:
  """Names the options in random order: 'one, two, three or four'."""
  *first, last = rng.sample(options, len(options))
  return f'{", ".join(first)} or {last}'
