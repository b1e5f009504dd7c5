"""How questions about words are put, and which go to which split."""

from collections.abc import Callable, Iterator, Sequence
import random
import re
from typing import TypeVar

from experiments.scale_study.tasks.procedural import formats
from experiments.scale_study.tasks.source import (
  Dataset,
  Example,
  Metric,
  Split,
)
from experiments.scale_study.tasks.splits import split_of

T = TypeVar('T')

# How many options a choice has.
OPTIONS = 4


def asked(
  name: str,
  category: str,
  subjects: Sequence[tuple[str, T]],
  ask: Callable[[random.Random, T], Example],
  metric: Metric = 'accuracy',
) -> Dataset:
  """Makes a dataset of questions about subjects.

  Args:
    name: of the dataset.
    category: of the dataset.
    subjects: with a text that names what is asked about. It decides the split,
      so that nothing is asked about in two.
    ask: draws an example about a subject.
    metric: how answers are scored.
  """

  def examples(split: Split, seed: int) -> Iterator[Example]:
    rng = random.Random(f'{name}/{split}/{seed}')
    known = [subject for text, subject in subjects if split_of(text) == split]
    if split != 'train':
      texts: set[str] = set()
      for subject in rng.sample(known, len(known)):
        example = ask(rng, subject)
        if example.prompt not in texts:
          texts.add(example.prompt)
          yield example
      return
    while known:
      yield ask(rng, rng.choice(known))

  return Dataset(name, category, metric, examples)


def choice(
  rng: random.Random, text: str, question: str, options: Sequence[str]
) -> Example:
  """A choice of which the first option is right."""
  prompt = formats.ask_choice(rng, text, question, options)
  return Example(prompt, options[0], tuple(options))


def claim(rng: random.Random, text: str, question: str, true: bool) -> Example:
  """A question to be answered by yes if `true`, else by no."""
  prompt = formats.ask_yes_no(rng, text, question)
  return Example(prompt, formats.YES_NO[not true], formats.YES_NO)


def replace_word(sentence: str, word: str, by: str) -> str:
  """Replaces the only occurrence of a word, which is not part of another."""
  return re.sub(rf'\b{re.escape(word)}\b', lambda _: by, sentence, count=1)
