"""The numbers that a report gives of every merged block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mergekit_jax.driving.block import as_floats, Block
from mergekit_jax.driving.reported import Flags
from mergekit_jax.kernels.sums import sums_in_passing


def measure_on(sharding: NamedSharding) -> Any:
  """`_sums` of a merged block, jitted as befits the devices."""
  platforms = {device.platform for device in sharding.device_set}
  return _sums_on_cpu if platforms == {'cpu'} else _sums_elsewhere


def _sums(
  sharding: NamedSharding, block: Block, merged: jax.Array, flags: Flags
) -> dict[str, Any]:
  """The sums that the report needs of a merged block.

  This is a computation of its own: a sum over what the merge computes would
  compute it again, and random bits are dear.

  Storing a value in a short dtype rounds it by an error that is spread evenly
  over one unit in the last place, so its mean square is a twelfth of that unit
  squared. An expert's units are all but the base's.

  Args:
    sharding: how the arrays lie on the mesh.
    block: the block.
    merged: its merge.
    flags: what the rule reported.

  Returns:
    Float64 scalars. Sums of squares: `base` of the base, `merged` of merged -
    base, `experts` of the task vectors, one an expert, and `rounding` of the
    expected rounding error of each; without a base the models take the place of
    task vectors. And `flags`, how many of each are true.
  """
  block = block.floats()
  merged = as_floats(merged, block.dtype)
  base = jnp.float32(0)
  if block.base is not None:
    base = block.base.astype(jnp.float32)
  deltas = [expert.astype(jnp.float32) - base for expert in block.experts]
  eps = [float(jnp.finfo(expert.dtype).eps) for expert in block.experts]
  powers = jnp.zeros_like(deltas[0])
  if block.base is not None and max(eps) > jnp.finfo(jnp.float32).eps:
    powers = _power_of_two(base)
  moved = merged.astype(jnp.float32) - base
  whole = jnp.broadcast_to(base, moved.shape)
  squares = [x * x for x in (whole, moved, powers, *deltas)]
  base_sum, merged_sum, powers_sum, *sums = _over_devices(
    sharding, [*squares, *flags.arrays()]
  )
  with jax.enable_x64(True):
    return {
      'base': base_sum,
      'merged': merged_sum,
      'experts': jnp.stack(sums[: len(deltas)]),
      'rounding': jnp.asarray([e * e / 12 for e in eps]) * powers_sum,
      'flags': jax.tree.unflatten(flags.structure, sums[len(deltas) :]),
    }


_sums_elsewhere = jax.jit(_sums, static_argnums=0)
# A CPU adds several numbers at once only if it may choose the order. NaN and
# Inf must show in the sums.
_sums_on_cpu = jax.jit(
  _sums,
  static_argnums=0,
  compiler_options={
    'xla_cpu_enable_fast_math': True,
    'xla_cpu_fast_math_honor_nans': True,
    'xla_cpu_fast_math_honor_infs': True,
  },
)


def _over_devices(
  sharding: NamedSharding, values: Sequence[jax.Array]
) -> list[jax.Array]:
  """The sums of arrays on a mesh, each device adding what it holds first.

  XLA gathers the arrays of one reduction along a dimension that is spread over
  devices, if they are several.
  """
  names = jax.tree.leaves(tuple(sharding.spec))
  if not names or not values[0].size:
    return sums_in_passing(values)

  def add(*held):
    sums = sums_in_passing(held)
    with jax.enable_x64(True):
      return jax.lax.psum(sums, tuple(names))

  return jax.shard_map(
    add,
    mesh=sharding.mesh,
    in_specs=sharding.spec,
    out_specs=PartitionSpec(),
    check_vma=False,
  )(*values)


def _power_of_two(x: jax.Array) -> jax.Array:
  """The largest power of two that is at most |x|, for finite float32 x."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
