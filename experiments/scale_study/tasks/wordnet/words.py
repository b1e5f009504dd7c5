"""The part of WordNet that short questions can be asked about."""

from collections.abc import Callable
import itertools
import random
from typing import NamedTuple

from experiments.scale_study.tasks.tokenizer import words_of
from experiments.scale_study.tasks.wordnet.database import Database, Key, Synset

# What is longer does not fit a short prompt; words may have to be spelled.
_MAX_WORDS = 12
_MAX_LETTERS = 12


class Entry(NamedTuple):
  """A common word in its most frequent sense."""

  word: str
  synset: Synset


class Usage(NamedTuple):
  """A sentence or phrase in which a word has a certain sense."""

  sentence: str
  word: str
  synset: Synset


class _Relations(NamedTuple):
  """Senses of the words of a synset, their direct kinds, and all above."""

  senses: set[Key]
  parents: set[Key]
  ancestors: set[Key]


class Words:
  """Common words, what they mean, and what else could be meant.

  Attributes:
    entries: in alphabetical order.
    usages: in the order of their words.
  """

  def __init__(
    self,
    database: Database,
    *,
    foils: int = 3,
    accepts: Callable[[str], bool] = str.isalpha,
  ):
    """Selects words.

    Args:
      database: where they come from.
      foils: how many can be drawn for each of them.
      accepts: whether a word may be asked about, or be an answer; those of the
        database are of letters only.
    """
    self._database = database
    self._accepts = accepts
    self.entries = [
      Entry(word, database.senses[word, part][0])
      for word, part in sorted(database.common)
      if len(word) <= _MAX_LETTERS
      and accepts(word)
      and _is_short(database.senses[word, part][0].definition)
    ]
    self.usages = [
      Usage(sentence.lower(), word, synset)
      for word, part in sorted(database.common)
      for synset in database.senses[word, part]
      for sentence in synset.examples
      if accepts(word)
      and _is_short(synset.definition)
      and _is_short(sentence)
      and words_of(sentence.lower()).count(word) == 1
    ]
    self._known_relations: dict[Key, _Relations] = {}
    self._company: dict[tuple[str, str], list[Entry]] = {}
    for entry in self.entries:
      self._company.setdefault(_kind(entry.synset), []).append(entry)
    self.entries = [e for e in self.entries if self._has_foils(e, foils)]
    self.usages = [
      usage
      for usage in self.usages
      if self._has_foils(Entry(usage.word, usage.synset), foils)
    ]

  def other_senses(self, usage: Usage) -> list[Synset]:
    """Returns what the word of a sentence might mean elsewhere."""
    return [
      sense
      for sense in self._database.senses[usage.word, usage.synset.key.part]
      if sense.definition != usage.synset.definition
      and _is_short(sense.definition)
    ]

  def synonyms(self, entry: Entry) -> list[str]:
    """Returns the other single words of a sense."""
    return [
      word
      for word in entry.synset.words
      if word.isalpha() and word != entry.word and self._accepts(word)
    ]

  def kinds(self, synset: Synset) -> list[str]:
    """Returns the single words that name what a sense is a kind of."""
    return [
      word
      for key in synset.hypernyms
      for word in self._database.synsets[key].words
      if word.isalpha() and self._accepts(word)
    ]

  def words_in(self, sentence: str) -> list[str]:
    """Returns the distinct words of a sentence that may be an answer."""
    return [
      word
      for word in dict.fromkeys(words_of(sentence))
      if word.isalpha() and self._accepts(word)
    ]

  def members(self) -> list[Entry]:
    """Returns the nouns that are a kind of something with a name."""
    return [
      entry
      for entry in self.entries
      if entry.synset.key.part == 'n' and self.kinds(entry.synset)
    ]

  def opposites(self) -> dict[str, str]:
    """Returns the opposite of every word that has one."""
    opposites = {}
    for word, synset in self.entries:
      for index, key, place in synset.antonyms:
        opposite = self._database.synsets[key].words[place]
        if synset.words[index] == word and opposite.isalpha():
          opposites.setdefault(word, opposite)
    return opposites

  def polysemes(self) -> list[tuple[str, list[Usage]]]:
    """Returns words used twice in one sense and once in another."""
    by_word: dict[tuple[str, str], list[Usage]] = {}
    for usage in self.usages:
      key = usage.word, usage.synset.key.part
      by_word.setdefault(key, []).append(usage)
    return [
      (word, usages)
      for (word, _), usages in by_word.items()
      if 1 < len({usage.synset.key for usage in usages}) < len(usages)
    ]

  def foils(self, rng: random.Random, of: Entry, count: int) -> list[str]:
    """Draws words of the same part of speech and subject, none related.

    Related are words that share a sense, or of which one is a kind of the
    other, or both of the same.

    Args:
      rng: source of randomness.
      of: what the words shall not be related to.
      count: how many, at most what the object was made for.

    Returns:
      Distinct words.
    """
    company = self._company[_kind(of.synset)]
    foils: list[str] = []
    while len(foils) < count:
      other = rng.choice(company)
      if other.word not in foils and self._unrelated(of, other):
        foils.append(other.word)
    return foils

  def _has_foils(self, of: Entry, count: int) -> bool:
    company = self._company.get(_kind(of.synset), [])
    foils = (other.word for other in company if self._unrelated(of, other))
    return len(set(itertools.islice(foils, count))) == count

  def _unrelated(self, one: Entry, two: Entry) -> bool:
    first, second = self._relations(one.synset), self._relations(two.synset)
    return (
      one.word != two.word
      and first.parents.isdisjoint(second.parents)
      and first.senses.isdisjoint(second.ancestors)
      and second.senses.isdisjoint(first.ancestors)
    )

  def _relations(self, synset: Synset) -> _Relations:
    if synset.key not in self._known_relations:
      # With all senses of its words: a foil may not be right in any of them.
      senses = {synset.key}
      for word in synset.words:
        found = self._database.senses.get((word, synset.key.part), ())
        senses.update(sense.key for sense in found)
      parents = self._parents(senses)
      ancestors, last = senses | parents, parents
      while last:
        last = self._parents(last) - ancestors
        ancestors |= last
      self._known_relations[synset.key] = _Relations(senses, parents, ancestors)
    return self._known_relations[synset.key]

  def _parents(self, keys: set[Key]) -> set[Key]:
    synsets = self._database.synsets
    return {parent for key in keys for parent in synsets[key].hypernyms}


def _kind(synset: Synset) -> tuple[str, str]:
  return synset.key.part, synset.subject


def _is_short(text: str) -> bool:
  return 0 < len(words_of(text)) <= _MAX_WORDS
