"""What a task is: labelled examples on demand, split by their prompts."""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import random
from typing import Literal, NamedTuple

Split = Literal['train', 'validation', 'test']


class Example(NamedTuple):
  """A prompt with its answer; words are separated by single spaces.

  `candidates` are the distinct one-word answers among which a model chooses,
  empty where the answer is free text.
  """

  prompt: str
  answer: str
  candidates: tuple[str, ...] = ()

  @property
  def chance(self) -> float:
    """Probability that a uniform guess is right, 0 for free text."""
    return 1 / len(self.candidates) if self.candidates else 0.0


def split_of(prompt: str) -> Split:
  """Assigns a prompt to a split: 80 % train, 10 % validation, 10 % test.

  A hash decides, not the seed: whatever is drawn and however often, no prompt
  is ever seen in two splits.
  """
  digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
  bucket = int.from_bytes(digest) % 10
  return 'test' if bucket == 0 else 'validation' if bucket == 1 else 'train'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A named, endless source of examples."""

  name: str
  draw: Callable[[random.Random], Example]

  def examples(self, split: Split, seed: int) -> Iterator[Example]:
    """Yields fresh examples of a split forever, the same for the same seed."""
    rng = random.Random(f'{self.name}/{split}/{seed}')
    while True:
      example = self.draw(rng)
      if split_of(example.prompt) == split:
        yield example
