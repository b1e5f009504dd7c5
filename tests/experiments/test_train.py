"""Training: the optimizer, its loss, and phases that are killed and go on."""

import dataclasses
import itertools
import subprocess
import sys

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from experiments.scale_study import model, shapes, stored, train
import mergekit_jax as mk
from mergekit_jax.sharding import make_mesh

_CONFIG = shapes.small(vocabulary_size=24, width=16, layers=1, heads=2)
_STEPS = 4 * train.CHUNK_STEPS


@pytest.fixture(scope='module')
def params():
  return model.create(_CONFIG, jax.random.key(0))


def batches(seed=0):
  """Texts that count on from a random number, for ever."""
  random = np.random.default_rng(seed)
  while True:
    first = random.integers(0, 24, (4, 1), np.int32)
    tokens = (first + np.arange(12, dtype=np.int32)) % 24
    yield tokens, np.ones((4, 12), np.float32)


def phase(params, directory=None, texts=None, config=_CONFIG, **changes):
  """Trains as every test here does, but for `changes`."""
  settings = {'steps': _STEPS, 'peak_rate': 1e-2, 'save_every': 1, **changes}
  return train.train(
    config,
    params,
    batches() if texts is None else texts,
    label='test',
    directory=directory,
    **settings,
  )


@pytest.fixture(scope='module')
def undisturbed(params):
  return phase(params)


def test_loss_counts_weighted_tokens_only(params):
  tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
  weights = np.zeros((2, 10), np.float32)
  weights[0, 4] = 3.0
  logits = model.logits(_CONFIG, params, tokens)
  expected = -jax.nn.log_softmax(logits[0, 3])[tokens[0, 4]]
  value = jax.jit(train.loss, static_argnums=0)(
    _CONFIG, params, train.Batch(tokens, weights)
  )
  # Both are float32; the compiled loss sums the softmax in another order.
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def _adamw(params, gradients, rates):
  """AdamW after Loshchilov and Hutter, 2019, in float64, leaf by leaf."""
  mean, variance = np.zeros((2, len(params))).tolist()
  for step, rate in enumerate(rates, 1):
    slopes = gradients(step - 1, params)
    norm = np.sqrt(sum(np.sum(slope**2) for slope in slopes))
    for leaf, slope in enumerate(slopes):
      slope = slope / max(norm, 1.0)
      mean[leaf] = 0.9 * mean[leaf] + 0.1 * slope
      variance[leaf] = 0.98 * variance[leaf] + 0.02 * slope**2
      update = mean[leaf] / (1 - 0.9**step)
      update = update / (np.sqrt(variance[leaf] / (1 - 0.98**step)) + 1e-8)
      params[leaf] = params[leaf] - rate * (update + 0.01 * params[leaf])
  return params


@pytest.fixture(scope='module')
def three_steps(params):
  """Parameters after three steps, of which the first has rate 0."""
  gradient = jax.jit(jax.grad(train.loss, argnums=1), static_argnums=0)
  leaves, structure = jax.tree.flatten(params)
  texts = list(itertools.islice(batches(), 3))

  def gradients(step, leaves):
    current = structure.unflatten([leaf.astype('f4') for leaf in leaves])
    slopes = gradient(_CONFIG, current, train.Batch(*texts[step]))
    return [np.asarray(slope, 'f8') for slope in jax.tree.leaves(slopes)]

  leaves = [np.asarray(leaf, 'f8') for leaf in leaves]
  rates = train.learning_rates(3, 1e-2)
  return structure.unflatten(_adamw(leaves, gradients, rates))


@pytest.mark.parametrize('axes', [None, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_steps_are_those_of_adamw_on_any_mesh(params, three_steps, axes):
  mesh = make_mesh(axes) if axes else None
  # Computing activations again changes nothing.
  config = dataclasses.replace(_CONFIG, remat=mesh is not None)
  state, _ = phase(params, steps=3, config=config, mesh=mesh)
  # Both steps are about 1e-2. Gradients are float32, and where one is nearly
  # zero Adam divides its rounding error by it.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5),
    state['params'],
    three_steps,
  )
  if mesh is not None:
    kernel = state['params']['layers']['attention']['query']['kernel']
    assert kernel.sharding.spec == PartitionSpec(None, 'fsdp', 'tensor')


def test_rates_warm_up_and_decay():
  rates = train.learning_rates(200, 1e-3)
  assert rates.shape == (200,) and rates[0] == 0
  assert rates.argmax() == 10 and rates.max() == np.float32(1e-3)
  assert np.all(np.diff(rates[10:]) <= 0) and rates[-1] < 6e-5


def test_training_lowers_the_loss_and_keeps_what_it_started_from(
  params, undisturbed
):
  state, losses = undisturbed
  before = model.create(_CONFIG, jax.random.key(0))
  assert losses.shape == (_STEPS,)
  assert losses[-20:].mean() < 0.2 * losses[:20].mean()
  assert state['step'] == _STEPS
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_all_start_with_one_program(params, caplog):
  """Those that are drawn, which lie where they happen to, and those read."""
  read = jax.device_put(params, jax.devices()[0])
  train.train_chunk.clear_cache()
  with jax.log_compiles(), caplog.at_level('WARNING', logger='jax'):
    for start in (params, read):
      phase(start, steps=2 * train.CHUNK_STEPS)
  compiled = [x for x in caplog.messages if 'Compiling jit(train_chunk)' in x]
  assert len(compiled) == 1


def test_a_killed_phase_goes_on_with_the_same_bits(
  tmp_path, params, undisturbed
):
  killed = subprocess.run(
    [sys.executable, '-m', 'tests.experiments.train_and_die', tmp_path / 'run'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert killed.returncode == -9, killed.stderr
  state, losses = phase(params, tmp_path / 'run')
  expected, all_losses = undisturbed
  # It died in the third chunk of four.
  np.testing.assert_array_equal(losses, all_losses[2 * train.CHUNK_STEPS :])
  jax.tree.map(np.testing.assert_array_equal, state, expected)

  again, none = phase(params, tmp_path / 'run')
  assert again is None and none.shape == (0,)
  # The directory is a checkpoint like any other.
  specs = mk.open_checkpoint(tmp_path / 'run').specs
  assert 'params/layers/attention/query/kernel' in specs
  restored = stored.load(tmp_path / 'run', _CONFIG)
  jax.tree.map(np.testing.assert_array_equal, restored, expected['params'])

  with pytest.raises(ValueError, match='another training: peak_rate is 0.01'):
    phase(params, tmp_path / 'run', peak_rate=2e-2)
  with pytest.raises(ValueError, match='another training: first_batch is'):
    phase(params, tmp_path / 'run', batches(seed=1))
  with pytest.raises(ValueError, match='start is .*scores/ and cells/ of its'):
    phase(expected['params'], tmp_path / 'run')


def test_too_few_batches_are_an_error(params):
  texts = [next(batches())] * 70
  with pytest.raises(ValueError, match='only 70'):
    phase(params, texts=texts)
  with pytest.raises(ValueError, match='no batches'):
    phase(params, texts=[])
