"""Text to tokens and back: words, and bytes for words that are not known."""

from collections.abc import Iterable, Sequence
import functools
import re

_WORD = re.compile(r'\w+|[^\w\s]')


def words_of(text: str) -> list[str]:
  """Splits at spaces, and punctuation from words."""
  return _WORD.findall(text)


def spaced(text: str) -> str:
  """Returns its words with a space between: alike if their tokens are."""
  return ' '.join(words_of(text))


class Tokenizer:
  """A vocabulary of words, with ids in the order: specials, bytes, words.

  Attributes:
    pad: id that fills up rows.
    start: id that opens every text.
    end: id that closes an answer.
    size: number of ids.
  """

  pad, start, end = 0, 1, 2

  def __init__(self, words: Iterable[str], *, spell: bool = False):
    """Makes a vocabulary.

    Args:
      words: what has an id of its own.
      spell: whether other words are spelled in bytes of UTF-8; else they are
        an error.
    """
    self.words = tuple(sorted(set(words)))
    self._first_byte = 3 if spell else None
    self._first_word = 3 + 256 * spell
    self.size = self._first_word + len(self.words)

  @functools.cached_property
  def _index(self) -> dict[str, int]:
    return {w: self._first_word + i for i, w in enumerate(self.words)}

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without start and end.

    Raises:
      ValueError: if a word is not known and may not be spelled.
    """
    ids = []
    for word in words_of(text):
      index = self._index.get(word)
      if index is not None:
        ids.append(index)
      elif self._first_byte is not None:
        # A space ends the spelling: two spelled words stay two.
        ids.extend(self._first_byte + byte for byte in f'{word} '.encode())
      else:
        raise ValueError(
          f'The word {word!r} is not among the {len(self.words)} of the '
          f'vocabulary. It stands in {text!r}.'
        )
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the words of `ids`, separated by spaces, up to the first end.

    Models may have more ids than there are words, which say nothing.
    """
    parts = bytearray()
    for index in map(int, ids):
      if index == self.end:
        break
      if index >= self.size:
        continue
      if index >= self._first_word:
        parts += f'{self.words[index - self._first_word]} '.encode()
      elif self._first_byte is not None and index >= self._first_byte:
        parts.append(index - self._first_byte)
    return ' '.join(parts.decode(errors='replace').split())
