"""The tokenizer of a model that there is already."""

from collections.abc import Sequence
from pathlib import Path


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

  def __init__(self, path: str | Path):
    """Reads a tokenizer.

    Raises:
      ImportError: if the package `tokenizers` is missing.
      ValueError: if it has no token that ends a text.
    """
    # Only models of Hugging Face need this package.
    import tokenizers  # type: ignore[import-not-found]

    self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    self.size = self._tokenizer.get_vocab_size()
    names = ('<|end_of_text|>', '<|endoftext|>', '</s>', '<|im_end|>')
    found = [self._tokenizer.token_to_id(name) for name in names]
    ends = [index for index in found if index is not None]
    if not ends:
      raise ValueError(f'{path} has none of {names}, which would end a text.')
    self.end = ends[0]
    names = ('<|begin_of_text|>', '<s>')
    starts = [self._tokenizer.token_to_id(name) for name in names]
    # Qwen has no token that opens a text.
    self.start = next((i for i in starts if i is not None), self.end)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without start and end."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, up to the first end."""
    ids = [int(index) for index in ids]
    stop = ids.index(self.end) if self.end in ids else len(ids)
    return self._tokenizer.decode(ids[:stop])
