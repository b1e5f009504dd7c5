"""Checkpoints and the comparison of merges."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.scale_study import checkpoints, merges


def test_a_sharded_state_returns_as_it_was(tmp_path):
  state = {
    'params': {'kernel': jnp.arange(2 * 3 * 16.0).reshape(2, 3, 16)},
    'opt_state': (jnp.ones(5), jnp.ones((3, 7))),
    'step': jnp.int32(9),
  }
  sharded = checkpoints.shard(state, checkpoints.fsdp_mesh())
  split = 16 // jax.device_count()
  shard_shapes = [
    leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(sharded)
  ]
  assert shard_shapes == [(5,), (3, 7), (2, 3, split), ()]

  checkpoints.save(tmp_path / 'state', sharded)
  restored = checkpoints.restore(tmp_path / 'state', state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_models_are_compared_by_their_bits():
  model = {'a': {'b': jnp.array([0.0, jnp.nan])}, 'c': jnp.ones(3)}
  assert merges.unequal_leaves(model, model) == []
  negative_zero = {**model, 'a': {'b': jnp.array([-0.0, jnp.nan])}}
  assert merges.unequal_leaves(model, negative_zero) == ['a/b']
