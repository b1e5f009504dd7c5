"""What a rule reports of each element of a box, a bit a flag."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mergekit_jax.rule import PyTree


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['words'],
  meta_fields=['structure'],
)
@dataclasses.dataclass(frozen=True)
class Flags:
  """Flags of each element of a box.

  Together they are one output of a kernel: XLA's CPU backend computes what
  several outputs share, such as random bits, once for each.

  Attributes:
    words: unsigned integers, each `[*shape]`; their bits in order, the lowest
      first, are the flags.
    structure: the tree of the flags.
  """

  words: Sequence[jax.Array]
  structure: Any

  def arrays(self) -> list[jax.Array]:
    """The flags, float32 `[*shape]` of zeros and ones."""
    flags = []
    for word in self.words:
      left = self.structure.num_leaves - len(flags)
      for bit in range(min(jnp.iinfo(word.dtype).bits, left)):
        flags.append(((word >> bit) & 1).astype(jnp.float32))
    return flags


def pack(reported: PyTree) -> Flags:
  """Puts flags, bool arrays `[*shape]`, into words of up to 32 bits."""
  flags, structure = jax.tree.flatten(reported)
  words = []
  for start in range(0, len(flags), 32):
    some = flags[start : start + 32]
    bits = next(bits for bits in (8, 16, 32) if bits >= len(some))
    word = jnp.zeros(some[0].shape, f'uint{bits}')
    for i, flag in enumerate(some):
      word = word | (flag.astype(word.dtype) << i)
    words.append(word)
  return Flags(words, structure)
