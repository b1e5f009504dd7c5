"""The part of WordNet that short questions can be asked about."""

from collections.abc import Callable
import itertools
import random
from typing import Any, NamedTuple

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

  def subjects(self, word: str) -> set[str]:
    """Returns the subjects of a noun's senses, the rare ones too."""
    return {
      sense.subject for sense in self._database.senses.get((word, 'n'), ())
    }

  def synonyms(self, entry: Entry) -> list[str]:
    """Returns the other single words of a sense."""
    return [
      word
      for word in entry.synset.words
      if word.isalpha() and word != entry.word and self._accepts(word)
    ]

  def meanings(self) -> list[tuple[str, Entry]]:
    """Returns the entries that have synonyms, each with a name for its sense.

    Entries in which two words are synonyms have one name, whichever of the two
    they are of, and though the two may share several senses.
    """
    above: dict[Any, Any] = {}

    def name(of: Any) -> Any:
      while above.setdefault(of, of) != of:
        of = above[of]
      return of

    entries = [entry for entry in self.entries if self.synonyms(entry)]
    for entry in entries:
      for other in self.synonyms(entry):
        pair = frozenset((entry.word, other))
        above[name(pair)] = name(entry.synset.key)
    return [(''.join(name(entry.synset.key)), entry) for entry in entries]

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

  def kinds_of_members(self, foils: int) -> list[tuple[str, Entry]]:
    """Returns members with their kind, if so many foils are not of it."""
    found = [(self.kinds(entry.synset)[0], entry) for entry in self.members()]
    return [
      (kind, entry)
      for kind, entry in found
      if self._has_foils(entry, foils, not_under=kind)
    ]

  def foils(
    self,
    rng: random.Random,
    of: Entry,
    count: int,
    *,
    not_under: str = '',
  ) -> list[str]:
    """Draws words of the same part of speech and subject, none related.

    Related are words that share a sense, or of which one is a kind of the
    other, or both of the same.

    Args:
      rng: source of randomness.
      of: what the words shall not be related to.
      count: how many, at most what the object was made for.
      not_under: a kind of which the words shall not be either, however
        indirectly and in whichever sense; `kinds_of_members` tells of whose
        kind there are enough that are not.

    Returns:
      Distinct words.
    """
    company = self._company[_kind(of.synset)]
    foils: list[str] = []
    kinds = self._nouns(not_under)
    while len(foils) < count:
      other = rng.choice(company)
      if other.word not in foils and self._is_foil(of, other, kinds):
        foils.append(other.word)
    return foils

  def _has_foils(self, of: Entry, count: int, not_under: str = '') -> bool:
    company = self._company.get(_kind(of.synset), [])
    kinds = self._nouns(not_under)
    foils = (e.word for e in company if self._is_foil(of, e, kinds))
    return len(set(itertools.islice(foils, count))) == count

  def _nouns(self, word: str) -> set[Key]:
    return {sense.key for sense in self._database.senses.get((word, 'n'), ())}

  def _is_foil(self, one: Entry, two: Entry, kinds: set[Key]) -> bool:
    """Whether `two` is unrelated to `one`, and under none of some kinds."""
    first, second = self._relations(one.synset), self._relations(two.synset)
    return (
      one.word != two.word
      and first.parents.isdisjoint(second.parents)
      and first.senses.isdisjoint(second.ancestors)
      and second.senses.isdisjoint(first.ancestors)
      and second.ancestors.isdisjoint(kinds)
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
