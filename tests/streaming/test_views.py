"""What kernels see of a box: its elements in a row, where they are one run."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving.block import Block
from mergekit_jax.driving.cutting import MOST_INDICES
from mergekit_jax.kernels.random import key_for
from mergekit_jax.planning.plan import Box, Tensor
from mergekit_jax.sharding import make_mesh
from mergekit_jax.streaming.views import View, view
from tests import checkpoints, drivers, models


@mk.rule
class LeavesVectors:
  """Looks at the rank of what it stands on."""

  def __call__(self, t: mk.Place):
    return t.base if t.base.ndim == 1 else t.experts[0]


@mk.rule
class SortsRows:
  """Needs whole rows, and says something that depends on no model."""

  needs = 'row'

  def __call__(self, t: mk.Place):
    yield mk.Report(sorted=jnp.ones(t.experts[0].shape, bool))
    return jnp.sort(t.experts[0], axis=-1)


MESH = make_mesh({'x': 2, 'y': 2, 'one': 1})
ELEMENTWISE = [mk.ties(), mk.dare()]


def tensor_of(shape, stacked=()):
  dtype = jnp.dtype('bfloat16')
  return Tensor(
    path='leaf',
    shape=shape,
    sources=(dtype, dtype),
    dtype=dtype,
    stacked=stacked,
    boxes=(),
    whole_layers=False,
    amplification=1.0,
  )


def box_of(origin, shape, *spec):
  return Box(origin=origin, shape=shape, spec=jax.P(*spec))


@pytest.mark.parametrize(
  ('whole', 'stacked', 'origin', 'shape', 'spec'),
  [
    ((6,), (), (2,), (3,), ()),
    ((6, 5), (), (0, 0), (6, 5), ('x',)),
    ((6, 5), (), (2, 0), (4, 5), (('x', 'y'), None)),
    ((6, 5), (), (2, 0), (4, 5), ('x', 'one')),
    ((6, 5), (), (3, 1), (1, 2), (None, 'x')),
    ((4, 6, 5), (), (3, 2, 0), (1, 4, 5), (None, 'x')),
    ((4, 6, 5), (0,), (1, 2, 0), (2, 4, 5), (None, 'x')),
    ((4, 6, 5), (0,), (1, 0, 0), (2, 6, 5), ('x',)),
    ((2, 3, 4, 5), (0, 1), (0, 1, 2, 0), (2, 2, 2, 5), ()),
  ],
)
def test_the_elements_are_those_of_the_box_in_order(
  whole, stacked, origin, shape, spec
):
  """Each with its number in the layer, which its random bits come from."""
  box = box_of(origin, shape, *spec)
  seen = view(ELEMENTWISE, tensor_of(whole, stacked), box, MESH)
  layers = len(stacked)
  ones = (1,) * (len(shape) - layers - 1)
  assert seen.shape[:-1] == (*shape[:layers], *ones)
  assert seen.origin[:-1] == (*origin[:layers], *(0 for _ in ones))
  assert seen.whole == (*whole[:layers], *ones, MOST_INDICES)
  numbers = np.arange(np.prod(whole[layers:])).reshape(whole[layers:])
  index = tuple(
    slice(start, start + size)
    for start, size in zip(origin[layers:], shape[layers:], strict=True)
  )
  np.testing.assert_array_equal(
    numbers[index].reshape(-1), seen.origin[-1] + np.arange(seen.shape[-1])
  )
  spread = [name for name in spec if name not in (None, 'one')]
  assert [name for name in seen.spec if name] == spread


@pytest.mark.parametrize(
  ('rules', 'whole', 'stacked', 'origin', 'shape', 'spec'),
  [
    (ELEMENTWISE, (6, 5), (), (0, 1), (6, 2), ()),
    (ELEMENTWISE, (6, 5), (), (0, 0), (6, 5), (None, 'x')),
    (ELEMENTWISE, (6, 4, 5), (1,), (0, 1, 0), (6, 2, 5), ()),
    (ELEMENTWISE, (2**16, 2**16), (), (0, 0), (8, 2**16), ()),
    (ELEMENTWISE, (2**16, 2**15), (), (0, 0), (2**16, 2**15), ('one',)),
    (ELEMENTWISE, (), (), (), (), ()),
    (ELEMENTWISE, (4,), (0,), (1,), (2,), ()),
    ([mk.ties(), SortsRows()], (6, 5), (), (0, 0), (6, 5), ()),
  ],
  ids=[
    'columns',
    'spread over columns',
    'layers inside',
    'more than 32 bits count',
    'more than 31 bits count on a device',
    'scalar',
    'layers of scalars',
    'a rule that needs rows',
  ],
)
def test_other_boxes_are_seen_as_they_are(
  rules, whole, stacked, origin, shape, spec
):
  seen = view(
    rules, tensor_of(whole, stacked), box_of(origin, shape, *spec), MESH
  )
  assert seen == (shape, jax.P(*spec), origin, whole, stacked)


def test_a_number_of_an_element_may_need_all_32_bits():
  seen = view(
    ELEMENTWISE,
    tensor_of((2**16, 2**16 - 1)),
    box_of((65000, 0), (8, 65535)),
    MESH,
  )
  assert seen.origin == (0, 65000 * 65535)
  assert seen.origin[-1].dtype == np.uint32


@pytest.mark.parametrize('rule', [mk.dare(), mk.dare_ties()], ids=repr)
def test_rows_have_the_random_bits_of_their_elements(rule):
  """At the end of what 32 bits can count, a row of the tensor a device."""
  whole, origin, shape = (2**20, 4095), (2**20 - 8, 0), (8, 4095)
  mesh = make_mesh({'fsdp': 8})
  base, (expert,) = models.flat({'leaf': shape}, experts=1)
  box = box_of(origin, shape, 'fsdp')
  row = view([rule], tensor_of(whole), box, mesh)
  assert row.shape == (1, 8 * 4095)
  assert row.origin[-1] > 2**31
  plain = View(shape, box.spec, tuple(map(np.int32, origin)), whole, ())

  def merged(seen):
    placed = NamedSharding(mesh, seen.spec)
    held = [
      jax.device_put(model['leaf'].reshape(seen.shape), placed)
      for model in (base, expert)
    ]
    block = Block(
      base=held[0],
      experts=held[1:],
      key=key_for(jax.random.key(0), 'leaf'),
      origin=seen.origin,
      whole=seen.whole,
      stacked=(),
      dtype=jnp.dtype('float32'),
    )
    with drivers.short_slices(1000):
      return drivers.sliced(rule, [block])[0].reshape(-1)

  np.testing.assert_array_equal(merged(row), merged(plain))
  # And they are not those of the first elements.
  first = plain._replace(origin=(np.int32(0), np.int32(0)))
  assert (merged(first) != merged(plain)).any()


def merged_from_disk(tmp_path, rule, shapes, **options):
  """What a rule makes of checkpoints: of base, expert and merge, leaves."""
  base, experts = checkpoints.save_set(tmp_path, shapes, experts=1)
  output = tmp_path / 'out'
  mk.merge_checkpoints(
    rule, experts=experts, base=base, output=output, **options
  )
  return [checkpoints.load(path) for path in (base, *experts, output)]


def test_a_rule_sees_the_rank_of_a_tensor(tmp_path):
  shapes = {'matrix': (64, 48), 'vector': (48,)}
  base, expert, merged = merged_from_disk(tmp_path, LeavesVectors(), shapes)
  same = np.testing.assert_array_equal
  same(merged['params/matrix'], expert['params/matrix'])
  same(merged['params/vector'], base['params/vector'])


@pytest.mark.parametrize('spec', [('fsdp', None), (None, 'fsdp')])
def test_a_rule_that_needs_rows_gets_them(tmp_path, spec):
  """On a mesh, whatever XLA would make of what it returns."""
  _, expert, merged = merged_from_disk(
    tmp_path,
    SortsRows(),
    {'matrix': (64, 48)},
    mesh=make_mesh({'fsdp': 8}),
    partition_rules={'.*/matrix': jax.P(*spec)},
  )
  expected = np.sort(expert['params/matrix'], axis=-1)
  np.testing.assert_array_equal(merged['params/matrix'], expected)
