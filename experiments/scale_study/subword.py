"""The tokenizer of a model that there is already."""

from collections.abc import Sequence
from pathlib import Path

_STARTS = ('<|begin_of_text|>', '<s>')
_ENDS = ('<|end_of_text|>', '<|endoftext|>', '</s>', '<|im_end|>')


class Subwords:
  """Byte-pair tokens, as `tokenizer.json` of Hugging Face describes them.

  It stands in for `tasks.tokenizer.Tokenizer`.

  Attributes:
    pad: id that fills up rows; it is never learned nor attended to.
    start: id that opens every text.
    end: id that closes an answer.
    size: number of ids.
  """

  pad = 0

  def __init__(
    self,
    path: str | Path,
    *,
    starts: Sequence[str] = _STARTS,
    ends: Sequence[str] = _ENDS,
  ):
    """Reads a tokenizer.

    Args:
      path: of the tokenizer.json.
      starts: names of the token that opens a text, the first that there is.
      ends: likewise of the token that ends it.

    Raises:
      ImportError: if the package `tokenizers` is missing.
      ValueError: if it cannot be read or has no token that ends a text.
    """
    try:
      # Only models of Hugging Face need this package.
      import tokenizers
    except ImportError as error:
      raise ImportError(
        f'Reading {path} needs the package tokenizers: pip install '
        "'mergekit_jax[real]'."
      ) from error
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The package raises no other.
      raise ValueError(
        f'{path} cannot be read as a tokenizer: {error}. Give the path of a '
        'tokenizer.json; names on a hub are not looked up.'
      ) from error
    self.size = self._tokenizer.get_vocab_size()
    end = self._first_of(ends)
    if end is None:
      raise ValueError(f'{path} has none of {ends}, which would end a text.')
    start = self._first_of(starts)
    self.end = end
    # Qwen has no token that opens a text.
    self.start = end if start is None else start

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without start and end."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, up to the first end."""
    ids = [int(index) for index in ids]
    stop = ids.index(self.end) if self.end in ids else len(ids)
    return self._tokenizer.decode(ids[:stop])

  def _first_of(self, names: Sequence[str]) -> int | None:
    ids = map(self._tokenizer.token_to_id, names)
    return next((index for index in ids if index is not None), None)
