"""Answer formats: the wrappings of prompts that all tasks share.

A prompt is a text, a question and the word `answer`. None of these wrappings
occurs in the corpus: the format is what a fine-tuned model has to learn.
"""

from collections.abc import Sequence
import random

YES_NO = ('yes', 'no')


def passage(rng: random.Random, text: str) -> str:
  """Introduces the text a question is about."""
  frame = rng.choice(('text : {} .', 'passage : {} .', 'read this : {} .'))
  return frame.format(text)


def ask(rng: random.Random, text: str, question: str) -> str:
  """An open question."""
  frame = rng.choice(('{} {} ? answer :', '{} question : {} ? answer :'))
  return frame.format(text, question)


def ask_choice(
  rng: random.Random, text: str, question: str, options: Sequence[str]
) -> str:
  """A question that lists its possible answers, in random order."""
  shuffled = rng.sample(options, len(options))
  frame = rng.choice(
    (
      '{} {} ? options : {} . answer :',
      '{} {} ? choose one of {} . answer :',
    )
  )
  return frame.format(text, question, ' , '.join(shuffled))


def ask_yes_no(rng: random.Random, text: str, question: str) -> str:
  """A question to be answered by yes or no."""
  frame = rng.choice(
    (
      '{} {} ? yes or no ? answer :',
      '{} {} ? answer :',
    )
  )
  return frame.format(text, question)
