"""Answer formats: how a question is put so that the answer has a form.

All tasks share them, whatever they ask, and none occurs in the corpus: an
instruction-tuned base knows them, a pretrained one has yet to learn them.
"""

from collections.abc import Sequence
import random

YES_NO = ('yes', 'no')


def passage(rng: random.Random, text: str) -> str:
  """Introduces the text a question is about."""
  frame = rng.choice(
    ('text : {} . ', 'passage : {} . ', 'read this : {} . ', '{} . ')
  )
  return frame.format(text)


def ask(rng: random.Random, text: str, question: str) -> str:
  """An open question; `text` is empty or ends with a space."""
  frame = rng.choice(('{}{} ? answer :', '{}question : {} ? answer :'))
  return frame.format(text, question)


def ask_choice(
  rng: random.Random, text: str, question: str, options: Sequence[str]
) -> str:
  """A question that lists its possible answers, in random order."""
  shuffled = rng.sample(options, len(options))
  listed = rng.choice(
    (
      f'options : {" , ".join(shuffled)} .',
      f'choose one of {" , ".join(shuffled)} .',
      f'{" or ".join(shuffled)} ?',
      ' '.join(
        f'( {letter} ) {option}'
        for letter, option in zip('abcd', shuffled, strict=False)
      ),
    )
  )
  return f'{text}{question} ? {listed} answer :'


def ask_yes_no(rng: random.Random, text: str, question: str) -> str:
  """A question to be answered by yes or no."""
  frame = rng.choice(
    (
      '{}{} ? yes or no ? answer :',
      '{}{} ? options : yes , no . answer :',
      '{}{} ? answer :',
    )
  )
  return frame.format(text, question)


def instruct(rng: random.Random, frames: Sequence[str], *parts: str) -> str:
  """Puts parts into one of several frames, for answers in free text."""
  text = rng.choice(frames).format(*parts)
  return f'{text.rstrip()} answer :'
