"""The check that streamed merges are those in memory, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.scale_study import in_memory, model, shapes, sharding, stored
import mergekit_jax as mk
from mergekit_jax.sharding import make_mesh

_SHAPE = shapes.small(vocabulary_size=24, width=16, layers=2, heads=2)


def test_models_are_compared_by_their_bits():
  model = {'a': {'b': jnp.array([0.0, jnp.nan])}, 'c': jnp.ones(3)}
  assert in_memory.unequal_leaves(model, model) == []
  negative_zero = {**model, 'a': {'b': jnp.array([-0.0, jnp.nan])}}
  assert in_memory.unequal_leaves(model, negative_zero) == ['a/b']


def test_another_last_bit_is_found():
  base, *experts = (model.create(_SHAPE, jax.random.key(i)) for i in range(3))
  right = jax.tree.map(
    lambda one, two: ((one.astype('f8') + two) / 2).astype('f4'),
    *(jax.tree.map(np.asarray, expert) for expert in experts),
  )
  rule = mk.average()
  in_memory.demand_same({'average': (rule, right)}, experts, base, seed=0)
  bias = right['final_norm']['scale']
  bias[3] = np.nextafter(bias[3], np.float32(9))
  with pytest.raises(RuntimeError, match='average at .*final_norm/scale'):
    in_memory.demand_same({'average': (rule, right)}, experts, base, seed=0)


def test_a_sharded_model_returns_as_it_was(tmp_path):
  params = model.create(_SHAPE, jax.random.key(0))
  mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2})
  stored.save(tmp_path / 'model', sharding.place(params, mesh))
  whole = stored.load(tmp_path / 'model', _SHAPE)
  jax.tree.map(np.testing.assert_array_equal, whole, params)
  parts = stored.load(tmp_path / 'model', _SHAPE, mesh)
  embedding = parts['embedding']['embedding']
  assert embedding.sharding.shard_shape(embedding.shape) == (12, 8)
  jax.tree.map(np.testing.assert_array_equal, parts, params)
