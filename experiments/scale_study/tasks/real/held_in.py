"""The held-in categories for which there are real texts with answers."""

from collections.abc import Sequence
import random

from experiments.scale_study.tasks.real import asking
from experiments.scale_study.tasks.real.texts import Labelled
from experiments.scale_study.tasks.source import Dataset, Example
from experiments.scale_study.tasks.wordnet.asking import asked, OPTIONS
from experiments.scale_study.tasks.wordnet.words import Entry, Words


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
  """The subject that WordNet puts a noun under."""
  nouns = [entry for entry in words.entries if entry.synset.subject]
  subjects = sorted({entry.synset.subject for entry in nouns})

  def subject_of_word(rng: random.Random, entry: Entry) -> Example:
    subject = entry.synset.subject
    others = [other for other in subjects if other != subject]
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
