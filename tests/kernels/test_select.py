"""The exact k-th magnitude: against numpy, at every edge."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving.drive import advance, answer, Block
from mergekit_jax.kernels import select, sums
from mergekit_jax.rule import step
from tests import models

SIZE = 997


@mk.rule
class Threshold:
  """Shows the k-th magnitude of the only expert."""

  density: float

  def __call__(self, t):
    threshold = yield from mk.kth_magnitude(t.experts[0], self.density)
    return jnp.broadcast_to(threshold, t.experts[0].shape)


def kth(values, density):
  values = np.asarray(values, np.float32)
  return np.asarray(mk.merge(Threshold(density), [values])).ravel()[0]


def expected(values, density):
  magnitudes = np.abs(np.asarray(values, np.float32)).ravel()
  # NaN sorts last in numpy: the largest magnitude, as documented.
  k = max(1, round(1e6 * density) * magnitudes.size // 10**6)
  return np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]


def _values():
  random = np.random.default_rng(0)
  normal = random.normal(size=SIZE)
  few = random.integers(-3, 4, SIZE) / 8
  spread = normal * 10.0 ** random.integers(-30, 30, SIZE)
  adjacent = np.float32(1) + np.arange(SIZE) * np.finfo(np.float32).eps
  with_nan = np.where(np.arange(SIZE) % 100 == 7, np.nan, normal)
  with_inf = np.where(np.arange(SIZE) % 100 == 7, -np.inf, normal)
  smallest = np.finfo(np.float32).smallest_subnormal
  return {
    'normal': normal,
    'ties': few,
    'mostly zero': np.where(np.arange(SIZE) % 50, 0, normal),
    'zero': np.zeros(SIZE),
    'equal': np.full(SIZE, -0.3),
    'signed zeros': np.where(few > 0, 0.0, -0.0),
    'magnitudes': spread,
    'one bin': adjacent,
    'subnormal': random.integers(-(2**22), 2**22, SIZE) * float(smallest),
    'nan': with_nan,
    'inf': with_inf,
  }


VALUES = _values()
DENSITIES = [1e-6, 0.001, 0.0105, 0.2, 0.5, 0.999, 1.0]


@pytest.mark.parametrize('name', VALUES)
def test_equals_partition(name):
  for density in DENSITIES:
    got, want = kth(VALUES[name], density), expected(VALUES[name], density)
    assert got.dtype == np.float32
    # Bit patterns: a NaN is a NaN, and a subnormal number is not zero.
    assert got.view(np.uint32) == want.view(np.uint32), density


@pytest.mark.parametrize('value', [0.0, -2.5, 1e-40])
@pytest.mark.parametrize('density', [1e-6, 0.5, 1.0])
def test_one_element(value, density):
  assert kth([value], density) == np.abs(np.float32(value))


def test_shape_and_sharding_do_not_matter():
  values = VALUES['normal'][:960].astype(np.float32)
  want = expected(values, 0.2)
  assert kth(values.reshape(12, 80), 0.2) == want
  assert kth(values.reshape(2, 6, 80), 0.2) == want


def test_under_vmap_over_density():
  values = VALUES['normal'].astype(np.float32)
  densities = np.array([0.01, 0.3, 1.0], np.float32)
  got = jax.vmap(lambda d: mk.merge(Threshold(d), [values])[0])(densities)
  want = [expected(values, float(density)) for density in densities]
  np.testing.assert_array_equal(got, want)


HISTOGRAMS = {
  'platform': select.histogram,
  'scatter': select.histogram_by_scatter,
  'slices': select.histogram_by_slices,
  'matmul': select.histogram_by_matmul,
  'matmuls': functools.partial(select.histogram_by_matmul, most=100),
}


@pytest.mark.parametrize('size', [3, 256, 2**15 + 1, 2**16])
@pytest.mark.parametrize('name', HISTOGRAMS)
def test_histogram(name, size):
  bins = np.random.default_rng(size).integers(0, size + 1, (5, 61), np.int32)
  bins[0, :3] = 0
  bins[1, :3] = size - 1
  bins[2, :3] = size  # is not counted
  got = jax.jit(HISTOGRAMS[name], static_argnums=1)(bins, size)
  want = np.bincount(bins.ravel(), minlength=size)[:size]
  np.testing.assert_array_equal(got, want)
  assert got.dtype == np.int32


@pytest.mark.filterwarnings('error')
def test_histogram_leaks_no_tracers():
  bins = jnp.arange(12).reshape(3, 4) % 5
  with jax.check_tracer_leaks():
    counts = jax.jit(lambda bins: select.histogram(bins, 5))(bins)
  np.testing.assert_array_equal(counts, np.bincount(bins.ravel()))


def test_histogram_of_layers_that_are_many_together():
  """What counts is the size of a layer: 2**30 elements fit 32 bits."""
  bins = jax.ShapeDtypeStruct((4, 2**30), np.int32)
  counts = jax.eval_shape(
    jax.vmap(functools.partial(select.histogram, size=300)), bins
  )
  assert (counts.shape, counts.dtype) == ((4, 300), np.int32)


@pytest.mark.parametrize('name', HISTOGRAMS)
def test_histogram_under_vmap(name):
  size = 300
  bins = np.random.default_rng(1).integers(0, size + 1, (2, 3, 7, 5), np.int32)
  histogram = functools.partial(HISTOGRAMS[name], size=size)
  want = np.stack(
    [
      [np.bincount(layer.ravel(), minlength=size)[:size] for layer in group]
      for group in bins
    ]
  )
  one = jax.jit(jax.vmap(histogram))(bins[0])
  np.testing.assert_array_equal(one, want[0])
  two = jax.jit(jax.vmap(jax.vmap(histogram)))(bins)
  np.testing.assert_array_equal(two, want)
  last = jax.jit(jax.vmap(histogram, in_axes=2))(np.moveaxis(bins[0], 0, 2))
  np.testing.assert_array_equal(last, want[0])


def find(counts, values, density):
  """The threshold for given histograms of `counts` copies of `values`."""
  rule = Threshold(density)
  block = Block(
    None, [jnp.zeros(2)], None, (0,), (2,), (), jnp.dtype('float32')
  )
  bits = np.float32(values).view(np.uint32)
  high = np.zeros(2**16, np.int64)
  np.add.at(high, bits >> 15, counts)
  first = answer(rule, block, [high], [])
  chosen = int(first[0])
  low = np.zeros(2**15, np.int64)
  inside = bits >> 15 == chosen
  np.add.at(low, bits[inside] & 0x7FFF, np.asarray(counts)[inside])
  return np.float32(answer(rule, block, [low], [first]))


@pytest.mark.parametrize('density', [0.2, 0.3, 1e-6, 0.123457, 0.7, 1.0])
@pytest.mark.parametrize('size', [80_000_000, 2**31 + 11, 64 * 10**9 + 1])
def test_number_kept_of_many(size, density):
  """k is exact where 10^6 · n overflows 32 bits, and float32 cannot count n."""
  k = max(1, round(10**6 * density) * size // 10**6)
  # The cut lies exactly between the two values, or one entry beside it.
  assert find([k, size - k], [2.0, 1.0], density) == 2
  if k > 1:
    assert find([k - 1, size - k + 1], [2.0, 1.0], density) == 1
    # Likewise for two values of one bin of the high bits.
    close = np.float32([1.0000001, 1.0])
    assert find([k, size - k], close, density) == close[0]
    assert find([k - 1, size - k + 1], close, density) == close[1]


def test_a_float32_density_is_rounded_to_millionths():
  """There 0.7 is a little less, which must not cost an entry."""
  assert find([7, 3], [2.0, 1.0], np.float32(0.7)) == 2
  assert find([6, 4], [2.0, 1.0], np.float32(0.7)) == 1


def test_partials_are_exact_counts_of_every_expert():
  """No round depends on the number of experts, and no count is a float."""
  values = jnp.asarray(VALUES['ties'], jnp.float32)
  block = Block(
    None, [values], None, (0,), values.shape, (), jnp.dtype('float32')
  )
  (counts,) = advance(Threshold(0.5), block, []).partials
  assert counts.dtype == jnp.int32 and counts.sum() == SIZE
  generator = mk.kth_magnitude(values, 0.5)
  assert step(generator, []).totals[0].partial.shape == (2**16,)


def test_counts_of_all_devices_together(monkeypatch):
  """What no part overflows, all together may: counts are as long as needed."""
  monkeypatch.setattr(sums, '_INT32_LIMIT', 100)
  select._histogram.cache_clear()
  select.histogram.clear_cache()
  bins = np.random.default_rng(2).integers(0, 7, (16, 8), np.int32)
  placed = NamedSharding(models.mesh('2d'), PartitionSpec('fsdp', 'tensor'))
  got = select.histogram(jax.device_put(bins, placed), 7)
  select.histogram.clear_cache()
  assert got.dtype == np.int64
  np.testing.assert_array_equal(got, np.bincount(bins.ravel(), minlength=7))


@pytest.mark.parametrize('limit', [2**31, 100])
@pytest.mark.parametrize(
  ('mesh', 'spec'),
  [
    ('fsdp', PartitionSpec('fsdp')),
    ('fsdp', PartitionSpec(None, 'fsdp')),
    ('2d', PartitionSpec('fsdp', 'tensor')),
    ('2d', PartitionSpec('tensor', None, 'fsdp')),
    ('2d', PartitionSpec(None, ('tensor', 'fsdp'))),
  ],
)
def test_dimensions_that_devices_do_not_divide(mesh, spec, limit, monkeypatch):
  """Some devices hold less than others, and some nothing."""
  monkeypatch.setattr(sums, '_INT32_LIMIT', limit)
  select._histogram.cache_clear()
  select.histogram.clear_cache()
  placed = NamedSharding(models.mesh(mesh), spec)
  bins = np.random.default_rng(3).integers(0, 8, (9, 11, 5), np.int32)

  def count(bins, batch):
    histogram = functools.partial(select.histogram, size=7)
    for _ in range(batch):
      histogram = jax.vmap(histogram)
    return histogram(jax.lax.with_sharding_constraint(bins, placed))

  whole, rows = (jax.jit(count, static_argnums=1)(bins, i) for i in (0, 1))
  select.histogram.clear_cache()
  numbers = lambda x: np.bincount(x.ravel(), minlength=8)[:7]
  np.testing.assert_array_equal(whole, numbers(bins))
  np.testing.assert_array_equal(rows, [*map(numbers, bins)])
  assert whole.dtype == (np.int32 if limit > bins.size else np.int64)
