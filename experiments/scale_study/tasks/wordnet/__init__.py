"""Real words: tasks built at run time from an installed WordNet 3.

Eight categories (five held-in, all held-out but coreference resolution) with
definitions, kinds, synonyms, opposites and usage of common words, and a corpus
of the same facts in plain sentences. Nothing of WordNet is in this repository:
install it with `apt-get install wordnet-base`, or name a folder with its
`data.*` and `index.*` files.

  database.py   reads the files
  words.py      what is common, short, and has foils
  asking.py     how questions are put
  held_in.py, held_out.py  the questions
"""

import collections
from collections.abc import Callable, Iterator
import functools
import itertools
from pathlib import Path
import random

from experiments.scale_study.tasks.source import Piece, Source
from experiments.scale_study.tasks.tokenizer import Tokenizer, words_of
from experiments.scale_study.tasks.wordnet import database, held_in, held_out
from experiments.scale_study.tasks.wordnet.words import Words

FOLDER = Path('/usr/share/wordnet')

# Facts weigh more than the definitions and sentences around them.
FACT_WEIGHT = 3.0

_DOCUMENTS = 20_000


class NotInstalledError(FileNotFoundError):
  """WordNet is not where it was looked for."""


def source(folder: str | Path = FOLDER, *, vocabulary: int = 8192) -> Source:
  """Builds the tasks.

  Args:
    folder: with WordNet's files.
    vocabulary: how many of the most frequent words get an id of their own; the
      others are spelled in bytes.

  Raises:
    NotInstalledError: if the folder has no WordNet.
  """
  demand(folder)
  words = Words(database.read(Path(folder)))
  corpus = functools.partial(_corpus, words)
  return Source(
    held_in={
      'multiple_choice_qa': held_in.multiple_choice(words),
      'extractive_qa': held_in.extractive(words),
      'closed_book_qa': held_in.closed_book(words),
      'topic_classification': held_in.topic(words),
      'paraphrase_identification': held_in.paraphrase(words),
    },
    held_out={
      'sentence_completion': held_out.completion(words),
      'natural_language_inference': held_out.inference(words),
      'word_sense_disambiguation': held_out.word_sense(words),
    },
    instruction=held_out.instruction(words),
    corpus=corpus,
    tokenizer=Tokenizer(_frequent_words(corpus, vocabulary), spell=True),
  )


def demand(folder: str | Path) -> None:
  """Raises NotInstalledError if the folder has no WordNet."""
  if not (Path(folder) / 'data.noun').exists():
    raise NotInstalledError(
      f'There is no WordNet in {folder}. Install it (apt-get install '
      'wordnet-base), or name the folder that has data.noun.'
    )


def _corpus(words: Words, seed: int) -> Iterator[tuple[Piece, ...]]:
  """Yields what there is to say about a word, or a sentence with it."""
  rng = random.Random(f'corpus/{seed}')
  opposites = words.opposites()
  while True:
    entry = rng.choice(words.entries)
    word, synset = entry
    facts = [f'{word} means {other} .' for other in words.synonyms(entry)]
    facts += [f'{word} is a kind of {kind} .' for kind in words.kinds(synset)]
    if word in opposites:
      facts.append(f'{word} is the opposite of {opposites[word]} .')
    if synset.subject:
      facts.append(f'it is about {synset.subject} .')
    yield (
      Piece(f'{word} : {synset.definition} .'),
      *(Piece(fact, FACT_WEIGHT) for fact in rng.sample(facts, len(facts))),
    )
    yield (Piece(f'{rng.choice(words.usages).sentence} .'),)


def _frequent_words(
  corpus: Callable[[int], Iterator[tuple[Piece, ...]]], count: int
) -> list[str]:
  frequencies = collections.Counter(
    word
    for text in itertools.islice(corpus(0), _DOCUMENTS)
    for piece in text
    for word in words_of(piece.text)
  )
  return [word for word, _ in frequencies.most_common(count)]
