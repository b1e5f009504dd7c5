"""Slices: they tile what a device holds, and no bit depends on them."""

import itertools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving import cutting, drive, slices
from mergekit_jax.driving.block import bits_dtype
from mergekit_jax.kernels.random import key_for
from tests import compare, drivers, models


@pytest.mark.parametrize(
  ('shape', 'elements'),
  [
    ((), 4),
    ((1,), 1),
    ((7,), 3),
    ((6, 5), 30),
    ((6, 5), 10),
    ((7, 5), 11),
    ((7, 5), 3),
    ((2, 7, 5), 12),
    ((3, 4, 5), 1),
  ],
)
def test_tile(shape, elements):
  """Every element is in one slice, and no slice is longer than it may be."""
  found = np.zeros(shape, int)
  for offset, extents, counts in cutting._grids(shape, elements):
    assert math.prod(extents) <= elements
    for number in itertools.product(*map(range, counts)):
      box = tuple(
        slice(o + n * e, o + (n + 1) * e)
        for o, n, e in zip(offset, number, extents, strict=True)
      )
      assert found[box].shape == tuple(extents)
      found[box] += 1
  assert (found == 1).all()


def test_an_even_cut_leaves_no_rest():
  """One shape to compile where a divisor is not much shorter."""
  even, *rest = cutting._grids((1000, 1000), 2**17)
  assert not rest and even[1] == [125, 1000]
  # 3 slices of 4 would do, but 5 of 2 leave nothing over.
  even, *rest = cutting._grids((10,), 4)
  assert not rest and even == ([0], [2], [5])


STACKS = {
  'first': ((5, 8, 6), (0,), PartitionSpec(None, 'fsdp', None)),
  'middle': ((8, 5, 6), (1,), PartitionSpec('fsdp', None, None)),
  'sharded': ((4, 6, 7), (0,), PartitionSpec('fsdp')),
  'nested': ((2, 8, 3, 6), (0, 2), PartitionSpec(None, 'fsdp', None, 'tensor')),
}
RULES = {
  'average': mk.average(),
  'ties of a layer': mk.ties(0.3, scope='tensor'),
  'ties of all': mk.ties(0.3, scope='model'),
  'majority': mk.ties(0.3, scope='tensor', zero_mass='majority'),
  'dare': mk.dare(0.5),
}


@pytest.mark.parametrize(
  ('name', 'layout', 'dtype'),
  [
    *((name, 'nested', 'bfloat16') for name in RULES),
    *(
      ('ties of a layer', layout, 'bfloat16')
      for layout in STACKS
      if layout != 'nested'
    ),
    ('dare', 'middle', 'float32'),
    ('majority', 'sharded', 'float32'),
  ],
)
def test_stacked_layers(name, layout, dtype):
  """Bits in, bits out: the same as in memory, however the layers lie."""
  shape, stacked, spec = STACKS[layout]
  base, experts = models.flat({'kernel': shape}, dtype)
  expected = drivers.in_memory(
    RULES[name], experts, base, 0, stacked_axes={'.*/kernel': stacked}
  )
  placed = NamedSharding(models.mesh('2d'), spec)
  held = bits_dtype(jnp.dtype(dtype))
  bits = [
    jax.device_put(np.asarray(model['kernel']).view(held), placed)
    for model in (base, *experts)
  ]
  block = drive.Block(
    base=bits[0],
    experts=bits[1:],
    key=key_for(jax.random.key(0), 'kernel'),
    origin=(0,) * len(shape),
    whole=shape,
    stacked=stacked,
    dtype=jnp.dtype(dtype),
    sources=(jnp.dtype(dtype),) * 4,
  )
  with drivers.short_slices(10):
    (merged,) = drivers.sliced(RULES[name], [block])
  compare.same_bits({'kernel': merged.view(jnp.dtype(dtype))}, expected)


@pytest.mark.parametrize('name', ['ties of a layer', 'dare'])
def test_a_box_inside_of_a_stack(name):
  """Bits and totals of the layers that it holds, not of the first ones."""
  base, experts = models.flat({'kernel': (5, 8, 6)})
  expected = drivers.in_memory(
    RULES[name], experts, base, 0, stacked_axes={'.*/kernel': 0}
  )
  placed = NamedSharding(models.mesh('2d'), PartitionSpec(None, 'fsdp'))
  held = [
    jax.device_put(model['kernel'][2:4], placed) for model in (base, *experts)
  ]
  block = drive.Block(
    base=held[0],
    experts=held[1:],
    key=key_for(jax.random.key(0), 'kernel'),
    origin=(2, 0, 0),
    whole=(5, 8, 6),
    stacked=(0,),
    dtype=jnp.dtype('float32'),
  )
  with drivers.short_slices(10):
    (merged,) = drivers.sliced(RULES[name], [block])
  compare.same_bits({'box': merged}, {'box': expected['kernel'][2:4]})


@mk.rule
class LeavesVectors:
  """Looks at the rank of what it stands on, which a slice must not change."""

  def __call__(self, t: mk.Place):
    return t.base if t.base.ndim == 1 else t.experts[0]


@pytest.mark.parametrize('shape', [(8, 6), (48,)])
def test_the_rank_is_that_of_a_layer(shape):
  base, experts = models.flat({'leaf': shape}, experts=1)
  got = drivers.in_slices(LeavesVectors(), experts, base)
  kept = base if len(shape) == 1 else experts[0]
  compare.same_bits(got, kept)


@pytest.mark.parametrize(
  'given, count, wide',
  [
    ('int32', 2**31 - 1, 'int32'),
    ('int32', 2**31, 'int64'),
    ('int64', 5, 'int64'),
    ('float32', 5, 'float64'),
  ],
)
def test_sums_are_as_wide_as_they_may_have_to_be(given, count, wide):
  """Counts in 32 bits where these can count all elements of the box."""
  with jax.enable_x64(True):
    partial = jax.ShapeDtypeStruct((2,), given)
    zeros = slices._nothing([partial], count)[0]
  assert (zeros.dtype, zeros.shape) == (wide, (2,)) and not zeros.any()
