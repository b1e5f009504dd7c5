"""The model: causal, stacked, of the expected size, alike on any mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from experiments.scale_study import model, shapes, sharding
from mergekit_jax.sharding import make_mesh

_CONFIG = shapes.small(vocabulary_size=40, width=24, layers=2, heads=4)
_TOKENS = np.random.default_rng(0).integers(0, 40, (4, 12))


@pytest.fixture(scope='module')
def params():
  return model.create(_CONFIG, jax.random.key(0))


def test_later_tokens_do_not_change_earlier_logits(params):
  changed = _TOKENS.copy()
  changed[:, 7] = (changed[:, 7] + 1) % 40
  before, after = (
    model.logits(_CONFIG, params, ids) for ids in (_TOKENS, changed)
  )
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert not np.allclose(before[:, 7:], after[:, 7:])


def test_layers_are_stacked_and_nothing_is_missing(params):
  for leaf in jax.tree.leaves(params['layers']):
    assert leaf.shape[0] == _CONFIG.layers
  width, hidden = _CONFIG.width, _CONFIG.hidden
  attention, feed_forward = 4 * width**2, 3 * width * hidden
  convolution, norms = 3 * width, 2 * width
  expected = (
    _CONFIG.vocabulary_size * width
    + _CONFIG.layers * (attention + feed_forward + convolution + norms)
    + width
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_layers_start_different(params):
  for kernel in (
    params['layers']['attention']['query']['kernel'],
    params['layers']['convolution']['kernel'],
  ):
    assert not np.array_equal(kernel[0], kernel[1])


def test_rotation_depends_on_the_distance_only():
  query, key = jax.random.normal(jax.random.key(2), (2, 1, 1, 1, 8))
  repeated = [jnp.tile(x, (1, 10, 1, 1)) for x in (query, key)]
  queries, keys = (model.rotate(x, base=100.0)[0, :, 0] for x in repeated)
  products = queries @ keys.T
  # Sums of 8 float32 products that partly cancel, at different angles.
  np.testing.assert_allclose(products[2, 0], products[9, 7], rtol=1e-5)
  assert not np.allclose(products[2, 0], products[3, 0])


@pytest.mark.parametrize(
  ('width', 'layers', 'heads', 'hidden'),
  [(32, 2, 2, 80), (64, 2, 4, 160), (96, 3, 4, 256)],
)
def test_small_models_have_the_sizes_of_the_study(width, layers, heads, hidden):
  config = shapes.small(
    vocabulary_size=440, width=width, layers=layers, heads=heads
  )
  layer = 4 * width**2 + 3 * width * hidden + 5 * width
  assert _size(config) == 440 * width + layers * layer + width
  assert _size(config) // 1000 == {32: 37, 64: 123, 96: 375}[width]


@pytest.mark.parametrize('name', shapes.SIZES)
def test_large_models_have_the_sizes_of_their_names(name):
  billions = int(name.removesuffix('b'))
  assert _size(shapes.SIZES[name]) == pytest.approx(1e9 * billions, rel=0.02)


def _size(config):
  leaves = jax.tree.leaves(model.abstract_params(config))
  return sum(math.prod(leaf.shape) for leaf in leaves)


def test_logits_are_alike_on_a_mesh(params):
  config = dataclasses.replace(_CONFIG, remat=True)
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  with jax.set_mesh(mesh):
    spread = model.logits(config, sharding.place(params, mesh), _TOKENS)
  assert spread.sharding.shard_shape(spread.shape) == (1, 12, 20)
  # Float32, summed in another order; the logits are about 0.3.
  np.testing.assert_allclose(
    spread, model.logits(_CONFIG, params, _TOKENS), rtol=0, atol=1e-6
  )


def test_bfloat16_computes_the_same_roughly(params):
  config = dataclasses.replace(_CONFIG, dtype=jnp.bfloat16)
  rough = model.logits(config, params, _TOKENS)
  exact = model.logits(_CONFIG, params, _TOKENS)
  assert rough.dtype == jnp.float32
  # Two layers at 8 bits; the logits are about 0.3.
  np.testing.assert_allclose(rough, exact, rtol=0, atol=0.02)
  assert not np.allclose(rough, exact, rtol=0, atol=1e-4)


def test_rules_place_parameters_and_statistics_alike(params):
  mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  placed = sharding.shardings({'opt_state': ({'mu': params},)}, mesh)
  layers = placed['opt_state'][0]['mu']['layers']
  into, out = layers['attention']['key'], layers['feed_forward']['down']
  assert into['kernel'].spec == PartitionSpec(None, 'fsdp', 'tensor')
  assert out['kernel'].spec == PartitionSpec(None, 'tensor', 'fsdp')
  assert layers['attention_norm']['scale'].is_fully_replicated


def test_what_does_not_divide_is_left_whole():
  mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  table = {'embedding': {'embedding': jnp.zeros((41, 24))}}
  kernel = {'layers': {'a': {'up': {'kernel': jnp.zeros((1, 6, 8))}}}}
  out = {'layers': {'a': {'out': {'kernel': jnp.zeros((1, 8, 8))}}}}
  placed = sharding.shardings([table, kernel, out], mesh)
  assert [place.spec for place in jax.tree.leaves(placed)] == [
    PartitionSpec(None, 'fsdp'),
    PartitionSpec(None, None, 'tensor'),
    PartitionSpec(None, 'tensor', 'fsdp'),
  ]


@pytest.mark.parametrize('change', [{'kv_heads': 3}, {'head_size': 5}])
def test_heads_that_do_not_fit_are_an_error(change):
  with pytest.raises(ValueError, match='multiple of kv_heads'):
    dataclasses.replace(_CONFIG, **change)
