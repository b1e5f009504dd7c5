"""Reads WordNet's own files (Miller, 1995; the format is wndb(5WN))."""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
import re
from typing import NamedTuple

PARTS_OF_SPEECH = {'n': 'noun', 'v': 'verb', 'a': 'adjective', 'r': 'adverb'}
_FILES = {'n': 'noun', 'v': 'verb', 'a': 'adj', 'r': 'adv'}

# Names of the lexicographer files, by number (lexnames(5WN)): what a synset is
# about. Those of adjectives and adverbs say nothing about a subject.
SUBJECTS = {
  4: 'action',
  5: 'animal',
  6: 'artifact',
  8: 'body',
  9: 'thought',
  10: 'communication',
  11: 'event',
  12: 'feeling',
  13: 'food',
  14: 'group',
  15: 'place',
  17: 'nature',
  18: 'person',
  20: 'plant',
  21: 'possession',
  26: 'condition',
  27: 'substance',
  28: 'time',
}

_HYPERNYM, _ANTONYM = '@', '!'
_EXAMPLE = re.compile(r'"([^"]*)"')


class Key(NamedTuple):
  """Names a synset: part of speech and offset in its file."""

  part: str
  offset: str


@dataclasses.dataclass(frozen=True)
class Synset:
  """A sense that several words share.

  Attributes:
    key: its name.
    subject: of `SUBJECTS`, or '' for parts of speech that have none.
    words: lower case; those of several words with underscores.
    definition: what they mean.
    examples: sentences or phrases with one of the words.
    hypernyms: the kinds that it is a kind of.
    antonyms: opposites of single words, as (index in `words`, synset of the
      opposite, index there).
  """

  key: Key
  subject: str
  words: tuple[str, ...]
  definition: str
  examples: tuple[str, ...]
  hypernyms: tuple[Key, ...]
  antonyms: tuple[tuple[int, Key, int], ...]


@dataclasses.dataclass(frozen=True)
class Database:
  """Synsets, and the senses of every word.

  Attributes:
    synsets: by key.
    senses: the synsets of a (word, part of speech), the most frequent first.
    common: the words with a sense that occurs in the tagged texts of WordNet.
  """

  synsets: dict[Key, Synset]
  senses: dict[tuple[str, str], tuple[Synset, ...]]
  common: frozenset[tuple[str, str]]


def read(folder: Path) -> Database:
  """Reads `data.*` and `index.*` of a folder.

  Raises:
    FileNotFoundError: if the folder lacks any of the eight files.
  """
  synsets: dict[Key, Synset] = {}
  senses: dict[tuple[str, str], tuple[Synset, ...]] = {}
  common = set()
  for part, suffix in _FILES.items():
    for line in _lines(folder / f'data.{suffix}'):
      synset = parse_synset(line, part)
      synsets[synset.key] = synset
  for part, suffix in _FILES.items():
    for line in _lines(folder / f'index.{suffix}'):
      word, offsets, tagged = parse_index(line)
      if word.isalpha():
        senses[word, part] = tuple(
          synsets[Key(part, offset)] for offset in offsets
        )
        if tagged:
          common.add((word, part))
  return Database(synsets, senses, frozenset(common))


def parse_synset(line: str, part: str) -> Synset:
  """Reads a line of a data file.

  Args:
    line: `offset file type count (word id)... count (pointer)... | gloss`.
    part: of speech, a key of `PARTS_OF_SPEECH`.
  """
  fields, _, gloss = line.partition(' | ')
  offset, file, _, count, *rest = fields.split()
  end = 2 * int(count, 16)
  words = tuple(
    # An adjective may carry its syntax: `asleep(p)`.
    word.partition('(')[0].lower()
    for word in rest[:end:2]
  )
  pointers = rest[end + 1 : end + 1 + 4 * int(rest[end])]
  hypernyms, antonyms = [], []
  for symbol, target, of, places in zip(
    *(pointers[i::4] for i in range(4)), strict=True
  ):
    # Satellites of adjectives are in the file of adjectives.
    key = Key('a' if of == 's' else of, target)
    if symbol == _HYPERNYM:
      hypernyms.append(key)
    elif symbol == _ANTONYM:
      # Two hexadecimal digits for the word here and two for the one there.
      antonyms.append((int(places[:2], 16) - 1, key, int(places[2:], 16) - 1))
  definition, *_ = gloss.split('; "', 1)
  return Synset(
    key=Key(part, offset),
    subject=SUBJECTS.get(int(file), ''),
    words=words,
    definition=definition.strip(),
    examples=tuple(_EXAMPLE.findall(gloss)),
    hypernyms=tuple(hypernyms),
    antonyms=tuple(antonyms),
  )


def parse_index(line: str) -> tuple[str, list[str], int]:
  """Reads a line of an index file.

  Returns:
    The word, the offsets of its synsets, the most frequent first, and how many
    of them occur in tagged texts.
  """
  word, _, count, pointers, *rest = line.split()
  rest = rest[int(pointers) :]
  return word, rest[2 : 2 + int(count)], int(rest[1])


def _lines(path: Path) -> Iterator[str]:
  with path.open(encoding='utf-8') as file:
    for line in file:
      # Two spaces open the lines of the licence.
      if not line.startswith('  '):
        yield line
