"""The exact k-th largest magnitude, without sorting.

|x| as a uint32 bit pattern grows with |x|, so the k-th largest magnitude is
found digit by digit: a histogram of the high 16 bits gives the bin that holds
it, a histogram of the low 15 bits inside that bin gives its exact value. Both
are sums, so they add up over blocks, devices and tensors, and nothing is ever
gathered (`sort`, `top_k` and `quantile` gather a sharded array).
"""

from __future__ import annotations

import functools

import jax
from jax.custom_batching import custom_vmap
import jax.numpy as jnp

from mergekit_jax.kernels.sums import integer_for
from mergekit_jax.rule import Answering, Total

_LOW_BITS = 15
_LOW_MASK = 2**_LOW_BITS - 1


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
  low = (bits & _LOW_MASK).astype(jnp.int32)

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

  # Elements of other bins fall into one more bin, which is then left out.
  inside = jnp.where(high == chosen, low, _LOW_MASK + 1)
  counts = histogram(inside, _LOW_MASK + 2)[:-1]
  return (yield Total(counts, find_value))


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


# A function of its own only to be traced once for all experts.
@functools.partial(jax.jit, static_argnames='size')
def histogram(bins: jax.Array, size: int) -> jax.Array:
  """Counts the elements in each bin.

  Args:
    bins: int32 `[*shape]` in [0, size).
    size: number of bins, at most 2**16.

  Returns:
    int32 `[size]`, or int64 where int32 could overflow.
  """

  @custom_vmap
  def of_one(bins):
    return jax.lax.platform_dependent(
      bins,
      tpu=lambda bins: histogram_by_matmul(bins, size),
      default=lambda bins: histogram_by_scatter(bins, size),
    )

  # One flat histogram over layer * size + bin: a batched scatter is many times
  # slower. The matrix product batches well as it is.
  @of_one.def_vmap
  def of_many(axis_size, in_batched, bins):
    del in_batched
    layers = jnp.arange(axis_size, dtype=bins.dtype)
    layers = jax.lax.expand_dims(layers, range(1, bins.ndim))
    counts = jax.lax.platform_dependent(
      bins,
      tpu=jax.vmap(lambda bins: histogram_by_matmul(bins, size)),
      default=lambda bins: histogram_by_scatter(
        layers * size + bins, axis_size * size, bins.size // axis_size
      ).reshape(axis_size, size),
    )
    return counts, True

  with jax.enable_x64(integer_for(bins.size) == 'int64'):
    return of_one(bins)


def histogram_by_scatter(
  bins: jax.Array, size: int, most: int | None = None
) -> jax.Array:
  """A histogram by scatter-add. The N-d index array is never flattened.

  Args:
    bins: int32 `[*shape]` in [0, size).
    size: number of bins.
    most: the most that a bin can hold; the number of elements if absent.
  """
  dtype = integer_for(bins.size if most is None else most)
  return jnp.zeros(size, dtype).at[bins].add(1)


def histogram_by_matmul(bins: jax.Array, size: int) -> jax.Array:
  """A histogram as a product of one-hot matrices, for matrix units.

  bin = 256 * row + column, and counts[row, column] is the number of elements
  with both: the product of two one-hot matrices over the elements. A TPU
  serialises scatter-add, and its matrix unit does these 2**17 operations an
  element in less time than the element takes to read.
  """
  rows = -(-size // 256)
  row = jax.nn.one_hot(bins // 256, rows, dtype=jnp.int8)
  column = jax.nn.one_hot(bins % 256, 256, dtype=jnp.int8)
  elements = tuple(range(bins.ndim))
  counts = jax.lax.dot_general(
    row,
    column,
    ((elements, elements), ((), ())),
    preferred_element_type=integer_for(bins.size),
  )
  return counts.reshape(-1)[:size]
