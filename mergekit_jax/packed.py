"""The merge of a box and what its rule reports of it, in one pass.

XLA's CPU backend fuses what leads to one output. Several outputs of one kernel
store what they have in common, such as random bits, or compute it again for
each. So merged value and flags are put into one word an element and taken apart
again.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mergekit_jax import drive
from mergekit_jax.block import Block
from mergekit_jax.rule import PyTree


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['bits'],
  meta_fields=['structure'],
)
@dataclasses.dataclass(frozen=True)
class Flags:
  """What a rule reported of each element of a box, a bit a flag.

  Attributes:
    bits: unsigned integers, each `[*shape]`; their bits in order, the lowest
      first, are the flags.
    structure: the tree of the flags.
  """

  bits: Sequence[jax.Array]
  structure: Any

  def arrays(self) -> list[jax.Array]:
    """The flags, float32 `[*shape]` of zeros and ones."""
    flags = []
    for word in self.bits:
      width = 8 * word.dtype.itemsize
      left = self.structure.num_leaves - len(flags)
      for bit in range(min(width, left)):
        flags.append(((word >> bit) & 1).astype(jnp.float32))
    return flags


def merge(
  method: Any, block: Block, answers: Sequence[PyTree]
) -> tuple[jax.Array, Flags]:
  """Merges a block whose rounds are all answered.

  Args:
    method: the rule.
    block: the block.
    answers: the answers of all its rounds.

  Returns:
    The merge `[*shape]` in the block's dtype, and its flags.
  """
  together = pack(method, block, answers)
  if not _holds_flags(together[1], block.dtype):
    return together
  return unpack(together, block.dtype)


def _holds_flags(flags: Flags, dtype: jnp.dtype) -> bool:
  """Whether values of this dtype leave `pack` with flags above them."""
  return bool(_room(dtype) and flags.structure.num_leaves)


@jax.jit
def pack(
  method: Any, block: Block, answers: Sequence[PyTree]
) -> tuple[jax.Array, Flags]:
  """Merged values with flags in the bits above them, and flags without room."""
  reached = drive.on_layers(method, block, answers, report=True)
  _, merged, reported = reached
  flags, structure = jax.tree.flatten(reported)
  given = Flags(_words(flags), structure)
  if not _holds_flags(given, merged.dtype):
    return merged, given
  room = _room(merged.dtype)
  bits = jnp.finfo(merged.dtype).bits
  with jax.enable_x64(True):
    word = jax.lax.bitcast_convert_type(merged, f'uint{bits}')
    word = word.astype(_unsigned(bits + min(len(flags), room)))
    for i, flag in enumerate(flags[:room]):
      word = word | (flag.astype(word.dtype) << (bits + i))
  return word, Flags(_words(flags[room:]), structure)


def unpack(
  packed: tuple[jax.Array, Flags], dtype: jnp.dtype
) -> tuple[jax.Array, Flags]:
  """Takes apart what `pack` put together, if it `_holds_flags`."""
  word, flags = packed
  room = min(_room(dtype), flags.structure.num_leaves)
  bits = jnp.finfo(dtype).bits
  with jax.enable_x64(True):
    merged = jax.lax.bitcast_convert_type(word.astype(f'uint{bits}'), dtype)
    above = (word >> bits).astype(_unsigned(room))
  return merged, Flags([above, *flags.bits], flags.structure)


def _room(dtype: jnp.dtype) -> int:
  """How many flags fit above a value, in a word twice as long as it."""
  return {8: 8, 16: 16, 32: 32}.get(jnp.finfo(dtype).bits, 0)


def _words(flags: Sequence[jax.Array]) -> list[jax.Array]:
  """Flags as words of up to 32 bits."""
  words = []
  for start in range(0, len(flags), 32):
    some = flags[start : start + 32]
    word = jnp.zeros(some[0].shape, _unsigned(len(some)))
    for i, flag in enumerate(some):
      word = word | (flag.astype(word.dtype) << i)
    words.append(word)
  return words


def _unsigned(bits: int) -> str:
  return f'uint{next(n for n in (8, 16, 32, 64) if n >= bits)}'
