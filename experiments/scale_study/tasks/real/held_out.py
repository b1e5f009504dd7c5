"""Held-out categories, asked as texts that go on: what a small model can do."""

from collections.abc import Iterable
import random

from experiments.scale_study.tasks.real import asking
from experiments.scale_study.tasks.source import Dataset, Example
from experiments.scale_study.tasks.wordnet.asking import asked, OPTIONS
from experiments.scale_study.tasks.wordnet.database import Synset
from experiments.scale_study.tasks.wordnet.words import Entry, Usage, Words


def completion(words: Words) -> Dataset:
  """The last word of a sentence or phrase."""

  def last_word(rng: random.Random, usage: Usage) -> Example:
    entry = Entry(usage.word, usage.synset)
    options = (usage.word, *words.foils(rng, entry, OPTIONS - 1))
    begun = usage.sentence.removesuffix(f' {usage.word}')
    return asking.asked('Write a sentence.', usage.word, options, opening=begun)

  return asked(
    'last_word',
    'sentence_completion',
    [
      (usage.sentence, usage)
      for usage in words.usages
      if usage.sentence.endswith(f' {usage.word}')
    ],
    last_word,
  )


def word_sense(words: Words) -> Dataset:
  """Which synonym a word of a sentence has, of two of its senses."""

  def synonyms(usage: Usage, senses: Iterable[Synset]) -> list[str]:
    return [
      synonym
      for sense in senses
      for synonym in words.synonyms(Entry(usage.word, sense))
    ]

  subjects = []
  for usage in words.usages:
    right = synonyms(usage, [usage.synset])
    others = synonyms(usage, words.other_senses(usage))
    wrong = [word for word in others if word not in right]
    if right and wrong:
      subjects.append((usage.sentence, (usage, right, wrong)))

  def sense_of_word(
    rng: random.Random, subject: tuple[Usage, list[str], list[str]]
  ) -> Example:
    usage, *synonyms = subject
    right, wrong = map(rng.choice, synonyms)
    return asking.asked(
      f'What does "{usage.word}" mean in "{usage.sentence}"?',
      right,
      (right, wrong),
      opening=f'Here, "{usage.word}" means',
    )

  return asked(
    'sense_of_word', 'word_sense_disambiguation', subjects, sense_of_word
  )
