"""A procedural micro-world: the embedded default of the study.

Eight held-in categories and four held-out ones, tasks for instruction tuning
and a plain-text corpus, all generated from about 400 words. Examples are fresh
at every step, labels are exact, and what can be learned of one category from
another is known:

  lexicon.py    words and what is known of each
  world.py      sentences about people, topics, opinions, scenes
  corpus.py     knowledge and skills, as plain dialogue
  formats.py    answer formats, shared by all tasks
  instruction.py  formats, on tasks about single words
  answering.py, classifying.py, writing.py  the held-in categories
  held_out.py   each a new pairing of a skill and a format
"""

from collections.abc import Iterable
import functools
import itertools

from experiments.scale_study.tasks.procedural import (
  answering,
  classifying,
  corpus,
  held_out,
  instruction,
  writing,
)
from experiments.scale_study.tasks.source import (
  Dataset,
  demand_held_in,
  HELD_IN,
  Source,
)
from experiments.scale_study.tasks.tokenizer import Tokenizer, words_of

# Enough draws that no word can be missing: the rarest is in one of 200.
_DOCUMENTS = 6000
_EXAMPLES = 600

_HELD_IN = {
  'multiple_choice_qa': answering.MULTIPLE_CHOICE,
  'extractive_qa': answering.EXTRACTIVE,
  'closed_book_qa': answering.CLOSED_BOOK,
  'sentiment': classifying.SENTIMENT,
  'topic_classification': classifying.TOPIC,
  'structure_to_text': writing.STRUCTURE_TO_TEXT,
  'summarization': writing.SUMMARIZATION,
  'paraphrase_identification': classifying.PARAPHRASE,
}
_HELD_OUT = {
  'sentence_completion': held_out.COMPLETION,
  'natural_language_inference': held_out.INFERENCE,
  'coreference_resolution': held_out.COREFERENCE,
  'word_sense_disambiguation': held_out.WORD_SENSE,
}


@functools.cache
def source(categories: tuple[str, ...] = HELD_IN) -> Source:
  """Returns the micro-world, or a part of it that is sooner learned.

  Args:
    categories: held-in categories. With fewer than all, the corpus has only
      what they need, and there are neither held-out categories, which need
      several of them, nor instruction tasks.

  Raises:
    ValueError: if there is no such category.
  """
  demand_held_in(categories)
  whole = set(categories) == set(HELD_IN)
  held_in = {category: _HELD_IN[category] for category in categories}
  held_out = _HELD_OUT if whole else {}
  tasks = instruction.TASKS if whole else ()
  texts = functools.partial(corpus.documents, categories=(*held_in, *held_out))
  datasets = itertools.chain(*held_in.values(), *held_out.values(), tasks)
  return Source(
    held_in=held_in,
    held_out=held_out,
    instruction=tasks,
    corpus=texts,
    tokenizer=Tokenizer(_words(texts(0), datasets)),
  )


def _words(
  documents: Iterable[corpus.Document], datasets: Iterable[Dataset]
) -> set[str]:
  words = set()
  for document in itertools.islice(documents, _DOCUMENTS):
    words.update(words_of(' '.join(piece.text for piece in document)))
  for dataset in datasets:
    drawn = dataset.examples('train', 0)
    for example in itertools.islice(drawn, _EXAMPLES):
      words.update(words_of(f'{example.prompt} {example.answer}'))
  return words
