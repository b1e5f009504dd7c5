"""The held-in categories that WordNet can answer."""

from collections.abc import Iterable, Sequence
import random

from experiments.scale_study.tasks.procedural import formats
from experiments.scale_study.tasks.source import Dataset, Example
from experiments.scale_study.tasks.tokenizer import words_of
from experiments.scale_study.tasks.wordnet.asking import (
  asked,
  choice,
  claim,
  OPTIONS,
  replace_word,
)
from experiments.scale_study.tasks.wordnet.database import SUBJECTS
from experiments.scale_study.tasks.wordnet.words import Entry, Usage, Words


def multiple_choice(words: Words) -> tuple[Dataset, ...]:
  """Words by their definitions, and by what they are a kind of."""

  def word_of_definition(rng: random.Random, entry: Entry) -> Example:
    foils = words.foils(rng, entry, OPTIONS - 1)
    question = rng.choice(('which word means this', 'which word is defined'))
    text = f'definition : {entry.synset.definition} . '
    return choice(rng, text, question, (entry.word, *foils))

  def member_of_kind(rng: random.Random, member: tuple[str, Entry]) -> Example:
    kind, entry = member
    foils = words.foils(rng, entry, OPTIONS - 1, not_under=kind)
    question = rng.choice(
      (f'which one is a kind of {kind}', f'which one belongs to {kind}')
    )
    return choice(rng, '', question, (entry.word, *foils))

  category = 'multiple_choice_qa'
  return (
    asked(
      'word_of_definition',
      category,
      [(entry.synset.definition, entry) for entry in words.entries],
      word_of_definition,
    ),
    asked(
      'member_of_kind',
      category,
      [
        (kind, (kind, entry))
        for kind, entry in words.kinds_of_members(OPTIONS - 1)
      ],
      member_of_kind,
    ),
  )


def extractive(words: Words) -> tuple[Dataset, ...]:
  """The kind that a definition names, and the word of a sentence defined."""

  def kind_in_definition(rng: random.Random, entry: Entry) -> Example:
    present = words_of(entry.synset.definition)
    kind = next(k for k in words.kinds(entry.synset) if k in present)
    text = f'definition : {entry.synset.definition} . '
    question = rng.choice(
      ('what kind of thing is defined', 'which word names the kind')
    )
    return Example(formats.ask(rng, text, question), kind)

  def word_of_sentence(rng: random.Random, usage: Usage) -> Example:
    question = rng.choice(
      ('which word means {}', 'which word is defined as {}')
    )
    prompt = formats.ask(
      rng,
      formats.passage(rng, usage.sentence),
      question.format(usage.synset.definition),
    )
    return Example(prompt, usage.word)

  return (
    asked(
      'kind_in_definition',
      'extractive_qa',
      [
        (entry.synset.definition, entry)
        for entry in words.members()
        if set(words.kinds(entry.synset))
        & set(words_of(entry.synset.definition))
      ],
      kind_in_definition,
      'exact_match',
    ),
    asked(
      'word_of_sentence',
      'extractive_qa',
      [(usage.sentence, usage) for usage in words.usages],
      word_of_sentence,
      'exact_match',
    ),
  )


KIND_QUESTIONS = (
  'what kind of thing is {}',
  '{} is a kind of what',
  'to which kind does {} belong',
)
OPPOSITE_QUESTIONS = (
  'what is the opposite of {}',
  'which word is contrary to {}',
  'what is {} the opposite of',
)


def closed_book(words: Words) -> tuple[Dataset, ...]:
  """Kinds and opposites from memory, each in three wordings.

  A question is in one split, a fact in several: what is tested is whether a
  fact of the corpus or of training is known in other words.
  """

  def recall(rng: random.Random, fact: tuple[str, str]) -> Example:
    question, answer = fact
    return Example(formats.ask(rng, '', question), answer)

  def questions(
    facts: Iterable[tuple[str, str]], wordings: Sequence[str]
  ) -> list[tuple[str, tuple[str, str]]]:
    return [
      (wording.format(word), (wording.format(word), answer))
      for word, answer in facts
      for wording in wordings
    ]

  kinds = {e.word: words.kinds(e.synset)[0] for e in words.members()}
  return (
    asked(
      'recall_kind',
      'closed_book_qa',
      questions(kinds.items(), KIND_QUESTIONS),
      recall,
      'exact_match',
    ),
    asked(
      'recall_opposite',
      'closed_book_qa',
      questions(words.opposites().items(), OPPOSITE_QUESTIONS),
      recall,
      'exact_match',
    ),
  )


def topic(words: Words) -> tuple[Dataset, ...]:
  """What a definition is about: one of several subjects, or yes or no."""
  names = tuple(SUBJECTS.values())

  def subject_of_definition(rng: random.Random, entry: Entry) -> Example:
    subject = entry.synset.subject
    others = [name for name in names if name != subject]
    question = rng.choice(('what is this about', 'what is the topic'))
    text = formats.passage(rng, entry.synset.definition)
    options = (subject, *rng.sample(others, OPTIONS - 1))
    return choice(rng, text, question, options)

  def is_about_subject(rng: random.Random, entry: Entry) -> Example:
    true = rng.random() < 0.5
    others = [name for name in names if name != entry.synset.subject]
    claimed = entry.synset.subject if true else rng.choice(others)
    text = formats.passage(rng, entry.synset.definition)
    return claim(rng, text, f'is this about {claimed}', true)

  subjects = [
    (entry.synset.definition, entry)
    for entry in words.entries
    if entry.synset.subject
  ]
  category = 'topic_classification'
  return (
    asked('subject_of_definition', category, subjects, subject_of_definition),
    asked('is_about_subject', category, subjects, is_about_subject),
  )


def paraphrase(words: Words) -> tuple[Dataset, ...]:
  """Whether two words, or two sentences, mean the same."""

  def other_word(rng: random.Random, entry: Entry, same: bool) -> str:
    if same:
      return rng.choice(words.synonyms(entry))
    return words.foils(rng, entry, 1)[0]

  def same_meaning(rng: random.Random, entry: Entry) -> Example:
    same = rng.random() < 0.5
    text = f'first : {entry.word} . second : {other_word(rng, entry, same)} . '
    question = rng.choice(('do they mean the same', 'are they synonyms'))
    return claim(rng, text, question, same)

  def same_sentence(rng: random.Random, usage: Usage) -> Example:
    same = rng.random() < 0.5
    entry = Entry(usage.word, usage.synset)
    other = replace_word(
      usage.sentence, usage.word, other_word(rng, entry, same)
    )
    text = f'first : {usage.sentence} . second : {other} . '
    question = rng.choice(('is this a paraphrase', 'do they say the same'))
    return claim(rng, text, question, same)

  category = 'paraphrase_identification'
  return (
    asked(
      'same_meaning',
      category,
      words.meanings(),
      same_meaning,
    ),
    asked(
      'same_sentence',
      category,
      [
        (usage.sentence, usage)
        for usage in words.usages
        if words.synonyms(Entry(usage.word, usage.synset))
      ],
      same_sentence,
    ),
  )
