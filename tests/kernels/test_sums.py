"""Sums and counts: exact, or nearly so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergekit_jax.kernels import sums


@pytest.mark.parametrize(
  'shape', [(512, 4096), (100_003,), (3, 5, 7), (1,), (), (0, 4)], ids=str
)
def test_accurate_sum(shape):
  values = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
  got = jax.jit(sums.accurate_sum)(values)
  assert got.dtype == jnp.float64 and got.shape == ()
  total = values.astype(np.float64).sum()
  assert abs(float(got) - total) <= 1e-7 * total


def test_accurate_sum_beyond_float32():
  # A float32 accumulator would lose the ones beside 2**24.
  values = jnp.ones(4096).at[0].set(2.0**24)
  assert float(sums.accurate_sum(values)) == 2**24 + 4095
  # The sum does not fit into float32 at all.
  assert float(sums.accurate_sum(jnp.full(8, 3e38))) > 2.3e39


@pytest.mark.parametrize('shape', [(7, 9), (1,), (), (0, 3)], ids=str)
def test_count(shape):
  mask = np.random.default_rng(0).random(shape) > 0.4
  got = sums.count(jnp.asarray(mask))
  assert got.dtype == jnp.int32 and int(got) == mask.sum()


@pytest.mark.parametrize('size,dtype', [(2**31 - 1, 'int32'), (2**31, 'int64')])
def test_count_of_many(size, dtype):
  """Without allocating: the types that the counts of a huge tensor have."""
  mask = jax.ShapeDtypeStruct((size,), jnp.bool)
  assert jax.eval_shape(sums.count, mask).dtype == dtype
  assert sums.integer_for(size) == dtype


@pytest.mark.parametrize(
  'shape', [(7, 9), (5,), (), (0, 3), (3, 2**14 + 1)], ids=str
)
def test_sums_in_passing(shape):
  """Of floats and of flags, in one pass; the last shape has long rows."""
  random = np.random.default_rng(0)
  values = random.uniform(0, 1, shape).astype(np.float32)
  flags = random.random(shape) > 0.4
  total, true = jax.jit(sums.sums_in_passing)([values, flags])
  assert total.dtype == true.dtype == jnp.float64
  expected = values.astype(np.float64).sum()
  # Rows of up to 2**14 elements are added in float32: about 2**-24 * 2**7.
  assert abs(float(total) - expected) <= 1e-5 * expected
  assert float(true) == flags.sum()
