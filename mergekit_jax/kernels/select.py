"""The exact k-th largest magnitude, without sorting.

|x| as a uint32 bit pattern grows with |x|, so the k-th largest magnitude is
found digit by digit: a histogram of the high 16 bits gives the bin that holds
it, a histogram of the low 15 bits inside that bin gives its exact value. Both
are sums, so they add up over blocks, devices and tensors, and nothing is ever
gathered (`sort`, `top_k` and `quantile` gather a sharded array).
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mergekit_jax.kernels.sums import integer_for
from mergekit_jax.rule import Answering, Total
from mergekit_jax.sharding import padded, shards

_LOW_BITS = 15
_LOW_BINS = 2**_LOW_BITS
# Elements of a slice whose indices stay in a core's cache.
SLICE = 2**17


def kth_magnitude(
  values: jax.Array, density: jax.typing.ArrayLike
) -> Answering:
  """The magnitude of the k-th largest element over the scope, exactly.

  k = max(1, round(1e6 * density) * n // 1e6), where n is the number of
  elements in the scope; keeping every magnitude at or above the answer keeps
  at least k elements, and all elements when density is 1.

  Args:
    values: float32 `[*shape]`.
    density: the fraction to keep, in (0, 1].

  Yields:
    Two totals, one after the other: the two histograms.

  Returns:
    The threshold, a float32 scalar. NaN counts as the largest magnitude.
  """
  magnitudes = jnp.abs(jax.lax.stop_gradient(values))
  bits = jax.lax.bitcast_convert_type(magnitudes, jnp.uint32)
  high = (bits >> _LOW_BITS).astype(jnp.int32)
  low = (bits % _LOW_BINS).astype(jnp.int32)

  def find_bin(counts, answers):
    del answers
    density_in_millionths = jnp.round(1e6 * jnp.asarray(density, jnp.float64))
    kept = density_in_millionths.astype(jnp.int64) * jnp.sum(counts) // 10**6
    return _locate(counts, jnp.maximum(1, kept))

  chosen, _ = yield Total(histogram(high, 2**16), find_bin)

  def find_value(counts, answers):
    chosen, remaining = answers[-1]
    inside, _ = _locate(counts, remaining)
    pattern = (chosen << _LOW_BITS | inside).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)

  inside = jnp.where(high == chosen, low, _LOW_BINS)
  return (yield Total(histogram(inside, _LOW_BINS), find_value))


# A function of its own only to be traced once for all experts.
@jax.jit
def _locate(counts: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The bin of the k-th largest, and its rank from the top of that bin."""
  # In two steps of 2**8 bins: a running sum of 2**16 is slow to compile.
  groups = counts.reshape(2**8, -1)
  group, k = _locate_directly(jnp.sum(groups, axis=1), k)
  inside, k = _locate_directly(groups[group], k)
  return group * groups.shape[1] + inside, k


def _locate_directly(
  counts: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
  at_or_above = jnp.cumsum(counts[::-1])[::-1]
  chosen = jnp.maximum(jnp.sum(at_or_above >= k) - 1, 0)
  return chosen, k - (at_or_above[chosen] - counts[chosen])


# See `_locate`.
@functools.partial(jax.jit, static_argnames='size')
def histogram(bins: jax.Array, size: int) -> jax.Array:
  """Counts the elements in each bin.

  Args:
    bins: int32 `[*shape]` in [0, size]; what is in bin `size` is not counted.
    size: number of bins, at most 2**16.

  Returns:
    int32 `[size]`, or int64 where int32 could overflow.
  """
  with jax.enable_x64(integer_for(bins.size) == 'int64'):
    return _histogram(size, 0)(bins)


@functools.cache
def _histogram(size: int, batch: int) -> Callable[[jax.Array], jax.Array]:
  """A histogram for each entry of so many leading axes, for any platform.

  A batched scatter is many times slower than scatters one after another, so
  `vmap` adds a leading axis. The matrix product batches well as it is.
  """

  def by_matmul(bins):
    one = functools.partial(histogram_by_matmul, size=size)
    for _ in range(batch):
      one = jax.vmap(one)
    return one(bins)

  @custom_vmap
  def of_each(bins):
    return jax.lax.platform_dependent(
      bins,
      cpu=functools.partial(_on_parts, size=size, batch=batch),
      tpu=by_matmul,
      default=functools.partial(histogram_by_scatter, size=size, batch=batch),
    )

  @of_each.def_vmap
  def of_more(axis_size, in_batched, bins):
    del axis_size, in_batched
    return _histogram(size, batch + 1)(bins), True

  return of_each


def histogram_by_scatter(
  bins: jax.Array, size: int, batch: int = 0
) -> jax.Array:
  """A histogram by one scatter-add. The index array is never flattened.

  Args:
    bins: int32 `[*batch, *shape]` in [0, size]; bin `size` is left out.
    size: number of bins.
    batch: how many leading axes have a histogram for each entry.

  Returns:
    Counts, `[*batch, size]`.
  """
  entries, shape = bins.shape[:batch], bins.shape[batch:]
  # One flat histogram over entry * size + bin.
  number = jnp.arange(math.prod(entries), dtype=bins.dtype).reshape(entries)
  number = jax.lax.expand_dims(number, range(batch, bins.ndim))
  total = math.prod(entries) * size
  counts = jnp.zeros(total, integer_for(math.prod(shape)))
  bins = jnp.where(bins < size, number * size + bins, total)
  return _counted(counts, bins).reshape(*entries, size)


def _counted(counts: jax.Array, bins: jax.Array) -> jax.Array:
  """Adds 1 at every bin, and nothing past the last.

  As `counts.at[bins].add(1, mode='drop')` does, which looks for negative bins.
  """
  ones = jax.lax.full(bins.shape, 1, counts.dtype)
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(),
    inserted_window_dims=(0,),
    scatter_dims_to_operand_dims=(0,),
  )
  indices = jax.lax.expand_dims(bins, (bins.ndim,))
  mode = jax.lax.GatherScatterMode.FILL_OR_DROP
  return jax.lax.scatter_add(counts, indices, ones, numbers, mode=mode)


def histogram_by_slices(
  bins: jax.Array, size: int, batch: int = 0, dtype: Any = None
) -> jax.Array:
  """The same by a scatter-add of each short slice, for a core with a cache.

  XLA writes the indices and the ones to be added to memory before it scatters:
  5 times the time of the scatter itself, unless both stay in the cache. The
  array is flattened, so it must lie on one device. `dtype` is that of the
  counts; if absent, what can count the elements.
  """
  entries, shape = bins.shape[:batch], bins.shape[batch:]
  count = math.prod(shape)
  dtype = dtype or integer_for(count)
  whole, rest = divmod(count, SLICE)

  def of_one(bins):
    def add(i, counts):
      start = i * SLICE
      some = jax.lax.dynamic_slice_in_dim(bins, start, SLICE)
      return _counted(counts, some)

    counts = jnp.zeros(size, dtype)
    if whole:
      # One before the loop: under shard_map the counts of a part vary over the
      # devices, which zeros do not.
      counts = jax.lax.fori_loop(1, whole, add, add(0, counts))
    if rest:
      counts = _counted(counts, bins[whole * SLICE :])
    return counts

  flat = bins.reshape(math.prod(entries), count)
  return jax.lax.map(of_one, flat).reshape(*entries, size)


def _on_parts(bins: jax.Array, size: int, batch: int) -> jax.Array:
  """`histogram_by_slices` of each device's part, added over the devices."""
  if jax.sharding.get_abstract_mesh().manual_axes:
    return histogram_by_slices(bins, size, batch)

  # Of all devices together, each of which counts a part.
  dtype = integer_for(math.prod(bins.shape[batch:]))

  @custom_partitioning
  def counts(bins):
    return histogram_by_slices(bins, size, batch, dtype)

  whole = bins.shape  # XLA calls back when the array is gone

  def spec_of(array):
    # An array that nobody placed has a sharding without one.
    return getattr(array.sharding, 'spec', PartitionSpec())

  def placed(mesh, given, result):
    del result
    spec = padded(spec_of(given[0]), len(whole))
    return NamedSharding(mesh, PartitionSpec(*spec[:batch]))

  def partition(mesh, given, result):
    sharding = given[0].sharding
    entries = padded(spec_of(given[0]), len(whole))
    names = tuple(jax.tree.leaves(entries[batch:]))
    devices = shards(spec_of(given[0]), len(whole), mesh)
    # XLA makes the last parts as long as the others, with anything. Along the
    # batch that adds histograms, which XLA leaves out itself.
    uneven = [i for i in range(batch, len(whole)) if whole[i] % devices[i]]

    def of_part(part):
      with jax.enable_x64(dtype == 'int64'):
        for axis in uneven:
          number = jax.lax.axis_index(entries[axis]).astype(dtype)
          held = whole[axis] - number * part.shape[axis]
          position = jax.lax.broadcasted_iota(dtype, part.shape, axis)
          part = jnp.where(position < held, part, size)
        own = histogram_by_slices(part, size, batch, dtype)
        return jax.lax.psum(own, names) if names else own

    return mesh, of_part, placed(mesh, given, result), (sharding,)

  axes = [f'axis{i}' for i in range(len(whole))]
  counts.def_partition(
    partition,
    infer_sharding_from_operands=placed,
    sharding_rule=f'{" ".join(axes)} -> {" ".join([*axes[:batch], "bin"])}',
    reduction_factors=tuple(axes[batch:]),
  )
  return counts(bins)


def histogram_by_matmul(
  bins: jax.Array, size: int, most: int = 2**30
) -> jax.Array:
  """A histogram as a product of one-hot matrices, for matrix units.

  bin = 256 * row + column, and counts[row, column] is the number of elements
  with both: the product of two one-hot matrices over the elements. A TPU
  serialises scatter-add, and its matrix unit does these 2**17 operations an
  element in less time than the element takes to read. It has no product in
  int64, so of more than `most` elements every so many rows are counted apart:
  those of a block of rows would have to move between devices.
  """
  rows = -(-size // 256)
  elements = tuple(range(bins.ndim))

  def product(bins: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
      _one_hot(bins >> 8, rows),
      _one_hot(bins & 255, 256),
      ((elements, elements), ((), ())),
      preferred_element_type=jnp.int32,
    )

  dtype = integer_for(bins.size)
  parts = -(-bins.size // most)
  if parts <= 1:
    return product(bins).astype(dtype).reshape(-1)[:size]
  longest = max(elements, key=lambda axis: bins.shape[axis])
  number = jax.lax.broadcasted_iota(jnp.int32, bins.shape, longest) % parts
  counts = [product(jnp.where(number == i, bins, size)) for i in range(parts)]
  return jnp.sum(jnp.stack(counts), axis=0, dtype=dtype).reshape(-1)[:size]


def _one_hot(bins: jax.Array, size: int) -> jax.Array:
  """int8 `[*shape, size]`: 1 where a bin is, for as many."""
  shape = (*bins.shape, size)
  number = jax.lax.broadcasted_iota(bins.dtype, shape, bins.ndim)
  return (jax.lax.expand_dims(bins, (bins.ndim,)) == number).astype(jnp.int8)
