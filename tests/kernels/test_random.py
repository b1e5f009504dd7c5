"""Random bits that belong to an element, against jax.random."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergekit_jax.kernels import random

KEY = jax.random.key(7)
WORDS = jax.random.key_data(KEY)


def whole_bits(key, shape):
  with jax.enable_x64(True):
    return np.asarray(jax.random.bits(key, shape, 'uint64'))


@jax.jit
def _words(key, high, low):
  return random.threefry((key[0], key[1]), high, low)


def pair(key, index):
  high, low = _words(key, *index)
  return np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low)


@pytest.mark.parametrize(
  'shape,origin,whole',
  [
    ((5, 7, 3), (0, 0, 0), (5, 7, 3)),
    ((2, 3, 3), (1, 2, 0), (5, 7, 3)),
    ((1, 4, 1), (4, 3, 2), (5, 7, 3)),
    ((6,), (11,), (40,)),
    ((), (), ()),
    ((0, 3), (0, 0), (0, 3)),
  ],
  ids=str,
)
def test_box_equals_bits_of_the_whole(shape, origin, whole):
  index = random.element_index(shape, origin, whole)
  box = tuple(slice(o, o + s) for o, s in zip(origin, shape, strict=True))
  expected = whole_bits(KEY, whole)[box]
  np.testing.assert_array_equal(pair(WORDS, index), expected)


def test_traced_origin():
  index = jax.jit(lambda row: random.element_index((2, 3), (row, 1), (9, 5)))
  np.testing.assert_array_equal(
    pair(WORDS, index(6)), whole_bits(KEY, (9, 5))[6:8, 1:4]
  )


@pytest.mark.parametrize(
  'origin,whole',
  [
    ((70_000, 65_530), (100_000, 100_000)),
    ((3, 2**31 - 4), (4, 2**31)),
    ((0, 2**32 - 5), (1, 2**33)),
    ((2**20, 2**20, 5), (2**21, 2**21, 9)),
    ((40_000, 90_000), (42_949, 100_000)),  # just below 2**32
    ((0, 65_534, 65_532), (1, 65_536, 65_536)),  # 2**32 exactly
  ],
  ids=str,
)
def test_index_of_huge_tensors(origin, whole):
  shape = (2,) * (len(origin) - 1) + (4,)
  if whole[0] in (1, 4):
    shape = (1, *shape[1:])
  high, low = random.element_index(shape, origin, whole)
  assert high.dtype == low.dtype == jnp.uint32
  expected = np.zeros(shape, np.uint64)
  for position in np.ndindex(*shape):
    index = 0
    for axis, size in enumerate(whole):
      index = index * size + origin[axis] + position[axis]
    expected[position] = index
  got = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('data', [0, 1, 4, 2**31, 2**32 - 1])
def test_fold_equals_fold_in(data):
  got = jnp.stack(random.fold((WORDS[0], WORDS[1]), np.uint32(data)))
  expected = jax.random.key_data(jax.random.fold_in(KEY, np.uint32(data)))
  np.testing.assert_array_equal(got, expected)


def test_key_for():
  name = 'layers/mlp/kernel'
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  expected = KEY
  for word in (digest[:4], digest[4:]):
    data = np.uint32(int.from_bytes(word, 'big'))
    expected = jax.random.fold_in(expected, data)
  expected = jax.random.key_data(expected)
  np.testing.assert_array_equal(random.key_for(KEY, name), expected)
  np.testing.assert_array_equal(random.key_for(WORDS, name), expected)
  other = random.key_for(KEY, 'layers/mlp/bias')
  assert (np.asarray(other) != np.asarray(expected)).any()


def test_key_of_another_implementation():
  seeds = [
    random.key_for(jax.random.key(seed, impl='rbg'), 'a') for seed in (0, 1)
  ]
  assert all(s.shape == (2,) and s.dtype == jnp.uint32 for s in seeds)
  assert (np.asarray(seeds[0]) != np.asarray(seeds[1])).any()


SHAPE = (300, 211)


@pytest.fixture(scope='module')
def bits():
  """The bits of nine experts in layers 0 and 1."""

  @functools.partial(jax.jit, static_argnums=2)
  def draw(key, layer, expert, index):
    return random.expert_bits(key, layer, index)(expert)

  index = random.element_index(SHAPE, (0, 0), SHAPE)
  return {
    (layer, expert): np.asarray(draw(WORDS, layer, expert, index))
    for layer in (0, 1)
    for expert in range(9)
  }


def test_lanes_of_sixteen_bits(bits):
  for expert in range(9):
    key = jax.random.fold_in(jax.random.fold_in(KEY, 1), expert // 4)
    words = whole_bits(key, SHAPE)
    shift = (32, 48, 0, 16)[expert % 4]
    expected = words >> np.uint64(shift) & np.uint64(0xFFFF)
    np.testing.assert_array_equal(bits[1, expert], expected)


def test_uniform(bits):
  n = SHAPE[0] * SHAPE[1]
  for drawn in bits.values():
    assert drawn.dtype == np.uint32 and drawn.max() < 2**16
    counts = np.bincount(drawn.ravel() >> 8, minlength=256)
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum()
    # 255 degrees of freedom: mean 255, deviation sqrt(510); six of them.
    assert abs(chi_squared - 255) < 6 * np.sqrt(2 * 255)
    low = np.bincount(drawn.ravel() & 255, minlength=256)
    chi_squared = ((low - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_squared - 255) < 6 * np.sqrt(2 * 255)


def test_independent(bits):
  """Of experts, of layers, and of neighbouring elements."""
  n = SHAPE[0] * SHAPE[1]
  drawn = np.stack([value.ravel() for value in bits.values()]).astype(float)
  correlation = np.corrcoef(drawn)
  apart = correlation[~np.eye(len(drawn), dtype=bool)]
  assert np.abs(apart).max() < 6 / np.sqrt(n)
  for row in drawn:
    neighbours = np.corrcoef(row[1:], row[:-1])[0, 1]
    assert abs(neighbours) < 6 / np.sqrt(n)
