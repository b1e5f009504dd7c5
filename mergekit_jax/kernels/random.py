"""Random bits that belong to an element, not to a place in a computation.

The bits of an element are a function of (seed, mask name, layer, expert, index
of the element inside its layer slice) and of nothing else: the same on 1 or
512 devices, in blocks or whole, in any order, after a resume. They come from
Threefry-2x32 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2,
3"), written out so that XLA fuses it into the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Words = tuple[jax.Array, jax.Array]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_EXPERTS_PER_HASH = 4


def threefry(key: Words, high: jax.Array, low: jax.Array) -> Words:
  """Threefry-2x32 with 20 rounds, of a 64-bit counter under a 64-bit key.

  Args:
    key: two uint32 words.
    high: uint32 `[*shape]`, the high words of the counters.
    low: uint32 `[*shape]`, the low words.

  Returns:
    Two uint32 arrays `[*shape]`.
  """
  return _threefry(key, high, low)


def _rounds(key: Any, high: Any, low: Any) -> Any:
  schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
  x, y = high + schedule[0], low + schedule[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      x = x + y
      y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
      y = x ^ y
    x = x + schedule[(group + 1) % 3]
    y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
  return x, y


# A function of its own only to be traced and lowered once for each shape: XLA
# puts it in place.
_threefry = jax.jit(_rounds)


def fold(key: Words, data: jax.typing.ArrayLike) -> Words:
  """A new key from a key and 32 bits; equals `jax.random.fold_in`."""
  return threefry(key, jnp.uint32(0), jnp.asarray(data).astype(jnp.uint32))


def key_for(key: jax.Array, mask_name: str) -> jax.Array:
  """The key of one leaf: the caller's key with the leaf's mask name.

  Args:
    key: a typed or raw JAX key; keys of other implementations than Threefry
      are folded to 64 bits.
    mask_name: the name of the leaf (`roots.mask_name`).

  Returns:
    uint32 `[2]`.
  """
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    if str(jax.random.key_impl(key)) != 'threefry2x32':
      key = jax.random.bits(key, (2,), 'uint32')
    else:
      key = jax.random.key_data(key)
  high, low = _hashed(mask_name)
  return jnp.stack(fold(fold((key[0], key[1]), high), low))


def keys_for(seed: int, mask_names: Sequence[str]) -> np.ndarray:
  """`key_for` of many leaves under the Threefry key of a seed, on the host.

  Args:
    seed: an integer.
    mask_names: the names of the leaves.

  Returns:
    uint32 `[leaves, 2]`.
  """
  key = jax.random.key_data(jax.random.key(seed, impl='threefry2x32'))
  words: Any = np.asarray(key)[:, None]  # [2, 1]
  hashes = np.array([_hashed(name) for name in mask_names], np.uint32)
  for data in hashes.reshape(-1, 2).T:
    zeros = np.zeros(len(mask_names), np.uint32)
    words = _rounds(tuple(words), zeros, data)
  return np.stack(words, axis=1)


def _hashed(name: str) -> np.ndarray:
  """64 bits of a name as two words, the high one first."""
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return np.frombuffer(digest, '>u4').astype(np.uint32)


def element_index(
  shape: Sequence[int],
  origin: Sequence[jax.typing.ArrayLike],
  whole: Sequence[int],
) -> Words:
  """The row-major index, inside `whole`, of each element of a box.

  Args:
    shape: shape of the box.
    origin: where the box begins in each dimension, integer scalars.
    whole: shape of the tensor that the box is cut from.

  Returns:
    The high and low words of the 64-bit indices, uint32 `[*shape]`.
  """
  wide = math.prod(whole) >= 2**32
  dtype = jnp.uint64 if wide else jnp.uint32
  with jax.enable_x64(wide):
    index = jnp.zeros(tuple(shape), dtype)
    stride = 1
    for axis in reversed(range(len(shape))):
      position = jax.lax.broadcasted_iota(dtype, tuple(shape), axis)
      position = position + jnp.asarray(origin[axis]).astype(dtype)
      index = index + position * np.asarray(stride, dtype)
      stride *= whole[axis]
    low = index.astype(jnp.uint32)
    high = (index >> 32).astype(jnp.uint32) if wide else jnp.zeros_like(low)
  return high, low


def expert_bits(
  key: jax.Array, layer: jax.typing.ArrayLike, index: Words
) -> Callable[[int], jax.Array]:
  """The 16 random bits of every element, by expert.

  One hash gives 64 bits and so serves four experts: expert e takes lane e % 4
  of hash e // 4.

  Args:
    key: uint32 `[2]`, from `key_for`.
    layer: which layer slice, an integer scalar.
    index: the elements, from `element_index`.

  Returns:
    A function that gives the bits of an expert, uint32 `[*shape]`, each below
    2**16.
  """
  of_layer = fold((key[0], key[1]), layer)

  @functools.cache
  def hashed(group: int) -> Words:
    return threefry(fold(of_layer, group), *index)

  def bits(expert: int) -> jax.Array:
    group, lane = divmod(expert, _EXPERTS_PER_HASH)
    word = hashed(group)[lane // 2]
    return (word >> np.uint32(16 * (lane % 2))) & np.uint32(0xFFFF)

  return bits
