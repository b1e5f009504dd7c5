"""The model: causal, stacked, of the expected size, and able to learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.scale_study import model, train
from experiments.scale_study.tasks.encoding import Batches

_CONFIG = model.ModelConfig(vocabulary_size=40, width=24, layers=2, heads=4)


@pytest.fixture(scope='module')
def params():
  return model.create(_CONFIG, jax.random.key(0))


def test_later_tokens_do_not_change_earlier_logits(params):
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 40)
  changed = tokens.at[:, 7].add(1) % 40
  before, after = (
    model.apply(_CONFIG, params, ids) for ids in (tokens, changed)
  )
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert not np.allclose(before[:, 7:], after[:, 7:])


def test_layers_are_stacked_and_nothing_is_missing(params):
  for leaf in jax.tree.leaves(params['layers']):
    assert leaf.shape[0] == _CONFIG.layers
  width, hidden = _CONFIG.width, _CONFIG.hidden
  attention, feed_forward = 4 * width**2, 3 * width * hidden
  convolution = 3 * width
  expected = (
    _CONFIG.vocabulary_size * width
    + _CONFIG.layers * (attention + feed_forward + convolution)
    + width
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_layers_start_different(params):
  for kernel in (
    params['layers']['attention']['qkv']['kernel'],
    params['layers']['convolution']['kernel'],
  ):
    assert not np.array_equal(kernel[0], kernel[1])


def test_rotation_depends_on_the_distance_only():
  query, key = jax.random.normal(jax.random.key(2), (2, 1, 1, 1, 8))
  repeated = [jnp.tile(x, (1, 10, 1, 1)) for x in (query, key)]
  queries, keys = (model.rotate(x)[0, :, 0] for x in repeated)
  products = queries @ keys.T
  # Sums of 8 float32 products that partly cancel, at different angles.
  np.testing.assert_allclose(products[2, 0], products[9, 7], rtol=1e-5)
  assert not np.allclose(products[2, 0], products[3, 0])


def test_loss_counts_weighted_tokens_only(params):
  ids = np.arange(20, dtype=np.int32).reshape(2, 10)
  weights = np.zeros((2, 10), np.float32)
  weights[0, 4] = 3.0
  logits = model.apply(_CONFIG, params, ids)
  expected = -jax.nn.log_softmax(logits[0, 3])[ids[0, 4]]
  value = train.loss(_CONFIG, params, Batches(ids, weights))
  # Both are float32; the compiled loss sums the softmax in another order.
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_training_lowers_the_loss(params):
  text = np.tile(np.arange(12, dtype=np.int32), (train.CHUNK_STEPS, 4, 1))
  state, losses = train.train(
    _CONFIG,
    params,
    Batches(text, np.ones(text.shape, np.float32)),
    peak_rate=1e-2,
    label='test',
  )
  assert losses.shape == (train.CHUNK_STEPS,)
  assert losses[-1] < 0.2 * losses[0]
  assert state['step'] == train.CHUNK_STEPS
