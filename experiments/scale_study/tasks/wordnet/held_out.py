"""The held-out categories that WordNet can answer, and instruction tasks."""

from collections.abc import Sequence
import itertools
import random

from experiments.scale_study.tasks.procedural import formats
from experiments.scale_study.tasks.source import (
  Dataset,
  Example,
  INSTRUCTION,
)
from experiments.scale_study.tasks.wordnet.asking import (
  asked,
  choice,
  claim,
  OPTIONS,
  replace_word,
)
from experiments.scale_study.tasks.wordnet.database import PARTS_OF_SPEECH
from experiments.scale_study.tasks.wordnet.words import Entry, Usage, Words


def completion(words: Words) -> tuple[Dataset, ...]:
  """Which word fills the gap of a sentence."""

  def gap(rng: random.Random, usage: Usage) -> Example:
    foils = words.foils(rng, Entry(usage.word, usage.synset), OPTIONS - 1)
    sentence = replace_word(usage.sentence, usage.word, '_')
    question = rng.choice(('which word fills the gap', 'which word is missing'))
    return choice(rng, f'{sentence} . ', question, (usage.word, *foils))

  # Two sentences may differ in the word alone: the gap decides the split.
  subjects = [(replace_word(u.sentence, u.word, '_'), u) for u in words.usages]
  return (asked('gap', 'sentence_completion', subjects, gap),)


def inference(words: Words) -> tuple[Dataset, ...]:
  """Whether one thing's being something makes it another."""

  def is_a(rng: random.Random, entry: Entry) -> Example:
    true = rng.random() < 0.5
    kind = words.kinds(entry.synset)[0]
    claimed = kind if true else words.foils(rng, entry, 1)[0]
    text = f'premise : it is {entry.word} . hypothesis : it is {claimed} . '
    question = rng.choice(('does this follow', 'can we conclude this'))
    return claim(rng, text, question, true)

  subjects = [(entry.word, entry) for entry in words.members()]
  return (asked('is_a', 'natural_language_inference', subjects, is_a),)


def word_sense(words: Words) -> tuple[Dataset, ...]:
  """Whether a word has one sense in two sentences, and which in one."""

  def same_sense(rng: random.Random, usages: Sequence[Usage]) -> Example:
    same = rng.random() < 0.5
    one, two = rng.choice(
      [
        (one, two)
        for one, two in itertools.permutations(usages, 2)
        if (one.synset.key == two.synset.key) == same
      ]
    )
    text = f'first : {one.sentence} . second : {two.sentence} . '
    question = rng.choice(
      (
        f'does {one.word} mean the same in both',
        f'is {one.word} used in the same sense',
      )
    )
    return claim(rng, text, question, same)

  def sense_of_word(rng: random.Random, usage: Usage) -> Example:
    wrong = rng.choice(words.other_senses(usage))
    question = rng.choice(
      (
        f'what does {usage.word} mean here',
        f'which sense of {usage.word} is it',
      )
    )
    return choice(
      rng,
      formats.passage(rng, usage.sentence),
      question,
      (usage.synset.definition, wrong.definition),
    )

  category = 'word_sense_disambiguation'
  return (
    asked('same_sense', category, words.polysemes(), same_sense),
    asked(
      'sense_of_word',
      category,
      [
        (usage.sentence, usage)
        for usage in words.usages
        if words.other_senses(usage)
      ],
      sense_of_word,
    ),
  )


def instruction(words: Words) -> tuple[Dataset, ...]:
  """Tasks about words that none of the categories has."""
  parts = tuple(PARTS_OF_SPEECH.values())
  # A word may be a noun and a verb.
  listed = [*dict.fromkeys(entry.word for entry in words.entries)]

  def part_of_speech(rng: random.Random, entry: Entry) -> Example:
    part = PARTS_OF_SPEECH[entry.synset.key.part]
    others = [other for other in parts if other != part]
    text = f'word : {entry.word} ; {entry.synset.definition} . '
    if rng.random() < 0.5:
      options = (part, *others)
      return choice(rng, text, 'which part of speech is it', options)
    true = rng.random() < 0.5
    claimed = part if true else rng.choice(others)
    return claim(rng, text, f'is it used as {claimed}', true)

  def is_in_list(rng: random.Random, word: str) -> Example:
    *rest, absent = rng.sample(
      [w for w in rng.sample(listed, 5) if w != word], 3
    )
    true = rng.random() < 0.5
    present = rng.sample([word, *rest] if true else [absent, *rest], 3)
    return claim(
      rng, f'list : {" , ".join(present)} . ', f'is {word} in the list', true
    )

  def word_at_position(rng: random.Random, word: str) -> Example:
    others = [other for other in rng.sample(listed, 3) if other != word]
    chosen = rng.sample([word, *others[:2]], 3)
    place = ('first', 'second', 'last')[chosen.index(word)]
    text = f'list : {" , ".join(chosen)} . '
    return Example(formats.ask(rng, text, f'what is the {place} word'), word)

  entries = [(entry.word, entry) for entry in words.entries]
  texts = [(word, word) for word in listed]
  return (
    asked('part_of_speech', INSTRUCTION, entries, part_of_speech),
    asked('is_in_list', INSTRUCTION, texts, is_in_list),
    asked(
      'word_at_position', INSTRUCTION, texts, word_at_position, 'exact_match'
    ),
  )
