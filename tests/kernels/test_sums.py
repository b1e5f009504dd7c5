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
  part, whole = sums.count(jnp.asarray(mask))
  assert (part.dtype, whole.dtype) == (jnp.int32, jnp.int32)
  assert (int(part), int(whole)) == (mask.sum(), mask.size)


@pytest.mark.parametrize('size,dtype', [(2**31 - 1, 'int32'), (2**31, 'int64')])
def test_count_of_many(size, dtype):
  """Without allocating: the types that the counts of a huge tensor have."""
  mask = jax.ShapeDtypeStruct((size,), jnp.bool)
  part, whole = jax.eval_shape(sums.count, mask)
  assert part.dtype == whole.dtype == dtype
  assert sums.integer_for(size) == dtype
