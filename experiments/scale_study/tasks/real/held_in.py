"""The held-in categories, as far as real texts and one token can ask them."""

from collections.abc import Sequence
import random

from experiments.scale_study.tasks.real import asking
from experiments.scale_study.tasks.real.texts import Labelled
from experiments.scale_study.tasks.source import Dataset, Example
from experiments.scale_study.tasks.wordnet.asking import asked, OPTIONS
from experiments.scale_study.tasks.wordnet.words import Entry, Usage, Words

# How texts begin that say what a field of a record says.
_SAID = {
  'kind': 'It is a kind of',
  'field': 'It is about',
  'unlike': 'It is no',
}
_YES_NO = ('yes', 'no')
# Of words that only hold a sentence together.
_SHORT = 3


def sentiment(sentences: Sequence[Labelled]) -> Dataset:
  """Whether a sentence of a review of a movie is positive."""
  labels = ('positive', 'negative')

  def sentiment_of(rng: random.Random, sentence: Labelled) -> Example:
    del rng
    question = f'Is this review positive or negative? {sentence.text}'
    return asking.asked(question, sentence.label, labels)

  subjects = [(sentence.group, sentence) for sentence in sentences]
  return asked('movie_sentences', 'sentiment', subjects, sentiment_of)


def topic(descriptions: Sequence[Labelled]) -> Dataset:
  """The section of a package, by its short description; each as often."""
  topics = sorted({description.label for description in descriptions})

  def topic_of(rng: random.Random, description: Labelled) -> Example:
    question = (
      f'What is this about: {asking.listed(rng, topics)}? {description.text}'
    )
    return asking.asked(question, description.label, topics)

  by_topic = [[d for d in descriptions if d.label == topic] for topic in topics]
  fewest = min(map(len, by_topic))
  rng = random.Random(0)
  subjects = [
    (description.group, description)
    for of_topic in by_topic
    for description in rng.sample(of_topic, fewest)
  ]
  return asked('debian_sections', 'topic_classification', subjects, topic_of)


def multiple_choice(words: Words) -> Dataset:
  """The word that a definition defines; the others are of its kind."""

  def word_of_definition(rng: random.Random, entry: Entry) -> Example:
    options = (entry.word, *words.foils(rng, entry, OPTIONS - 1))
    question = (
      f'Which word means "{entry.synset.definition}": '
      f'{asking.listed(rng, options)}?'
    )
    return asking.asked(question, entry.word, options)

  return asked(
    'word_of_definition',
    'multiple_choice_qa',
    [(entry.synset.definition, entry) for entry in words.entries],
    word_of_definition,
  )


def closed_book(words: Words) -> Dataset:
  """The subject that WordNet puts a noun under; the others are of no sense."""
  nouns = [entry for entry in words.entries if entry.synset.subject]
  subjects = sorted({entry.synset.subject for entry in nouns})

  def subject_of_word(rng: random.Random, entry: Entry) -> Example:
    subject = entry.synset.subject
    meant = words.subjects(entry.word)
    others = [other for other in subjects if other not in meant]
    options = (subject, *rng.sample(others, OPTIONS - 1))
    question = (
      f'What is meant by "{entry.word}": {asking.listed(rng, options)}?'
    )
    return asking.asked(question, subject, options)

  return asked(
    'subject_of_word',
    'closed_book_qa',
    [(entry.word, entry) for entry in nouns],
    subject_of_word,
  )


def extractive(words: Words, usages: Sequence[Usage]) -> Dataset:
  """The word of a sentence that a definition defines."""

  def others(usage: Usage) -> list[str]:
    return [
      word
      for word in words.words_in(usage.sentence)
      if len(word) > _SHORT and word != usage.word
    ]

  def word_of_sentence(rng: random.Random, usage: Usage) -> Example:
    options = (usage.word, *rng.sample(others(usage), OPTIONS - 1))
    return asking.asked(
      f'"{usage.sentence}": which word means "{usage.synset.definition}"?',
      usage.word,
      options,
    )

  return asked(
    'word_of_sentence',
    'extractive_qa',
    [
      (usage.sentence, usage)
      for usage in usages
      if len(others(usage)) >= OPTIONS - 1
    ],
    word_of_sentence,
  )


def structure_to_text(words: Words) -> Dataset:
  """The end of a sentence that says one of the fields of a record."""

  def said(rng: random.Random, entry: Entry) -> Example:
    subject = entry.synset.subject
    foils = (foil for foil in words.foils(rng, entry, 2) if foil != subject)
    record = {
      'kind': words.kinds(entry.synset)[0],
      'field': subject,
      'unlike': next(foils),
    }
    fields = rng.sample([*record.items()], len(record))
    told = rng.choice([*record])
    question = '; '.join(f'{name}: {value}' for name, value in fields)
    return asking.asked(
      f'Write about "{entry.word}". {question}',
      record[told],
      [*record.values()],
      opening=_SAID[told],
    )

  return asked(
    'field_of_record',
    'structure_to_text',
    [
      (entry.word, entry)
      for entry in words.members()
      if entry.synset.subject not in ('', words.kinds(entry.synset)[0])
    ],
    said,
  )


def summarization(words: Words) -> Dataset:
  """A definition in one word, the kind that it names."""

  def kind_of_definition(rng: random.Random, entry: Entry) -> Example:
    kind = words.kinds(entry.synset)[0]
    options = (kind, *words.foils(rng, entry, OPTIONS - 1))
    question = f'Sum this up in a word: {entry.synset.definition}'
    return asking.asked(question, kind, options)

  return asked(
    'kind_of_definition',
    'summarization',
    [(entry.synset.definition, entry) for entry in words.members()],
    kind_of_definition,
  )


def paraphrase(words: Words) -> Dataset:
  """Whether two words mean the same."""

  def same_meaning(rng: random.Random, entry: Entry) -> Example:
    same = rng.random() < 0.5
    others = words.synonyms(entry) if same else words.foils(rng, entry, 1)
    question = f'Does "{entry.word}" mean "{rng.choice(others)}"?'
    return asking.asked(question, _YES_NO[not same], _YES_NO)

  return asked(
    'same_meaning',
    'paraphrase_identification',
    words.meanings(),
    same_meaning,
  )
