"""Real texts for a chat model, out of packages that are fetched at run time.

Held-in are the sentiment of movie reviews (vaderSentiment), topics of Debian's
packages (apt), and six categories of WordNet (wordnet-base); what the study
writes freely elsewhere is here a single word that a sentence or a definition
wants. Two held-out ones, of WordNet as well: the last word of a sentence, and
the sense of a word. The others of the study are not here: prompts for inference
and coreference leave a model of this size at chance.

Every answer is one token of the model's own tokenizer, and every example fits
`LENGTH`.

  texts.py      sentences and descriptions with their labels
  asking.py     the format of the chat
  held_in.py, held_out.py  the questions
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.scale_study import smollm2, subword
from experiments.scale_study.tasks import wordnet
from experiments.scale_study.tasks.real import held_in, held_out, texts
from experiments.scale_study.tasks.source import (
  demand_held_in,
  HELD_IN,
  Piece,
  Source,
)
from experiments.scale_study.tasks.wordnet import database
from experiments.scale_study.tasks.wordnet.words import Words

# Tokens of an example, at most: they decide what a run costs.
LENGTH = 40


def source(
  wordnet_folder: str | Path = wordnet.FOLDER,
  categories: tuple[str, ...] = HELD_IN,
) -> Source:
  """Builds the tasks.

  Args:
    wordnet_folder: with WordNet's files.
    categories: the held-in ones that are wanted.

  Raises:
    ValueError: if there is no such category.
    ImportError: if the package `tokenizers` or `gguf` is missing.
    NotInstalledError: if the folder has no WordNet.
    NotFetchedError: if a package is not there and cannot be fetched.
  """
  demand_held_in(categories)
  wordnet.demand(wordnet_folder)
  tokenizer: Any = subword.Subwords(
    smollm2.folder() / 'tokenizer.json',
    starts=[smollm2.START],
    ends=[smollm2.END],
  )

  def tokens(text: str) -> int:
    return len(tokenizer.encode(text))

  words = Words(
    database.read(Path(wordnet_folder)),
    accepts=lambda word: tokens(f' {word}') == 1,
  )
  # What is asked about may be as long as the question around it leaves room.
  sentences = [x for x in texts.movie_sentences() if tokens(x.text) <= 18]
  descriptions = [
    x for x in texts.debian_descriptions() if tokens(x.text) <= 11
  ]
  words.entries = [
    x for x in words.entries if tokens(x.synset.definition) <= 14
  ]
  words.usages = [x for x in words.usages if tokens(x.sentence) <= 9]
  defined = [x for x in words.usages if tokens(x.synset.definition) <= 9]
  datasets = (
    held_in.sentiment(sentences),
    held_in.topic(descriptions),
    held_in.multiple_choice(words),
    held_in.closed_book(words),
    held_in.extractive(words, defined),
    held_in.structure_to_text(words),
    held_in.summarization(words),
    held_in.paraphrase(words),
    held_out.completion(words),
    held_out.word_sense(words),
  )
  return Source(
    held_in={d.category: (d,) for d in datasets if d.category in categories},
    held_out={d.category: (d,) for d in datasets if not d.held_in},
    instruction=(),
    corpus=_corpus,
    tokenizer=tokenizer,
  )


def _corpus(seed: int) -> Iterator[tuple[Piece, ...]]:
  raise ValueError(
    "The tasks 'real' have no texts for pretraining: take models that there "
    'are already, as the preset smollm2 does.'
  )
