"""The numbers that a report gives of every merged block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mergekit_jax.drive import Block
from mergekit_jax.kernels.sums import sums_in_passing
from mergekit_jax.rule import PyTree


@jax.jit
def measure(block: Block, merged: jax.Array, flags: PyTree) -> dict[str, Any]:
  """The sums that the report needs of a merged block.

  This is a computation of its own: a sum over what the merge computes would
  compute it again, and random bits are dear.

  Storing a value in a short dtype rounds it by an error that is spread evenly
  over one unit in the last place, so its mean square is a twelfth of that unit
  squared. An expert's units are all but the base's.

  Args:
    block: the block.
    merged: its merge.
    flags: what the rule reported.

  Returns:
    Float64 scalars. Sums of squares: `merged` of merged - base, `experts` of
    the task vectors, one an expert, and `rounding` of the expected rounding
    error of each; without a base the models take the place of task vectors.
    And `flags`, how many of each are true.
  """
  base = jnp.float32(0)
  if block.base is not None:
    base = block.base.astype(jnp.float32)
  deltas = [expert.astype(jnp.float32) - base for expert in block.experts]
  eps = [float(jnp.finfo(expert.dtype).eps) for expert in block.experts]
  powers = jnp.zeros_like(deltas[0])
  if block.base is not None and max(eps) > jnp.finfo(jnp.float32).eps:
    powers = _power_of_two(base)
  leaves, structure = jax.tree.flatten(flags)
  squares = [
    x * x for x in (merged.astype(jnp.float32) - base, powers, *deltas)
  ]
  merged_sum, powers_sum, *sums = sums_in_passing([*squares, *leaves])
  with jax.enable_x64(True):
    return {
      'merged': merged_sum,
      'experts': jnp.stack(sums[: len(deltas)]),
      'rounding': jnp.asarray([e * e / 12 for e in eps]) * powers_sum,
      'flags': jax.tree.unflatten(structure, sums[len(deltas) :]),
    }


def _power_of_two(x: jax.Array) -> jax.Array:
  """The largest power of two that is at most |x|, for finite float32 x."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
