"""What of a training state is merged, and what is an optimizer's."""

from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import mergekit_jax as mk
from mergekit_jax import roots
from tests import checkpoints

SHAPES = {'dense': {'kernel': (4, 3), 'bias': (3,)}, 'out': {'kernel': (3, 2)}}


def params(seed):
  """A model, and others that are fine-tuned from it."""
  fixed, moved = np.random.default_rng(0), np.random.default_rng(seed + 1)
  both = lambda shape: (
    fixed.standard_normal(shape) + 0.1 * moved.standard_normal(shape)
  )
  draw = lambda shape: both(shape).astype('float32')
  is_shape = lambda x: isinstance(x, tuple)
  return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def opt_state(tx, tree, seed):
  """An optimizer's state after a step, larger than any weight."""
  gradients = jax.tree.map(lambda leaf: 1e3 * (leaf + seed), tree)
  return jax.tree.map(np.asarray, tx.update(gradients, tx.init(tree), tree)[1])


def moments(tree, seed):
  """Moments as others than optax call them."""
  return {name: jax.tree.map(lambda x: x + seed, tree) for name in ('m', 'v')}


ADAM, SGD = optax.adam(1e-3), optax.sgd(1e-3, momentum=0.9)
CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(1e-3))
# States of which the moments are not all, or that have no counter.
OTHERS = {
  'accumulated': optax.MultiSteps(ADAM, 4),
  'accumulated without moments': optax.MultiSteps(optax.sgd(1e-3), 4),
  'applied every': optax.apply_every(4),
  'schedule-free': optax.contrib.schedule_free_sgd(1e-3),
  'schedule-free moments': optax.contrib.schedule_free_adamw(1e-3),
  'lbfgs': optax.lbfgs(memory_size=2),
  'prodigy': optax.contrib.prodigy(),
  'mechanic': optax.contrib.mechanize(ADAM),
}
# Those that are known only beside parameters which they repeat.
REPEATED = {
  'rprop': optax.rprop(1e-3),
  'adadelta': optax.adadelta(1e-3),
  'optimistic': optax.optimistic_gradient_descent(1e-3),
}
# What is saved of parameters and a seed, where the parameters then lie, and
# whether anybody knows what lies beside them by its name.
STATES = {
  'params': (lambda p, s: {'params': p, 'opt': opt_state(ADAM, p, s)}, True),
  'model': (lambda p, s: {'model': p, 'optim': opt_state(ADAM, p, s)}, True),
  'weights': (lambda p, s: {'weights': p, 'optim': moments(p, s)}, False),
  'generator': (
    lambda p, s: {'generator': p, 'optimizer_state': moments(p, s)},
    False,
  ),
  'net': (lambda p, s: {'net': p, 'opt': opt_state(ADAM, p, s)}, False),
  'policy': (lambda p, s: {'policy': p, 'adam': moments(p, s)}, False),
  'critic': (lambda p, s: {'critic': p, 'x': opt_state(SGD, p, s)}, False),
  'actor': (lambda p, s: {'actor': p, 'tx': opt_state(CHAIN, p, s)}, False),
  'optimizer/target': (
    lambda p, s: {'optimizer': {'target': p, 'state': {'param_states': p}}},
    True,
  ),
  '0': (lambda p, s: (p, opt_state(ADAM, p, s), np.int32(s)), False),
  'state/params': (
    lambda p, s: {'state': {'params': p, 'opt': opt_state(SGD, p, s)}},
    True,
  ),
  'state/model': (
    lambda p, s: {'state': {'model': p, 'opt': opt_state(SGD, p, s)}},
    True,
  ),
}


@pytest.fixture
def save(tmp_path):
  def saved(name, tree):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / name, tree)
    return tmp_path / name

  return saved


@pytest.mark.parametrize('root', STATES)
def test_moments_are_left_out(save, tmp_path, root):
  """They have no part in a trim, and are not in the output."""
  wrap, is_known = STATES[root]
  paths = [save(f's{i}', wrap(params(i), i)) for i in range(3)]
  merged = mk.merge_checkpoints(
    mk.ties(density=0.3),
    base=paths[0],
    experts=paths[1:],
    output=tmp_path / 'o',
  )
  base, *experts = map(params, range(3))
  expected = mk.merge(mk.ties(density=0.3), experts, base)
  expected = {
    f'{root}/{path}': leaf
    for path, leaf in checkpoints.leaves(expected).items()
  }
  assert {tensor.path for tensor in merged.tensors} == expected.keys()
  loaded = checkpoints.load(tmp_path / 'o')
  for path, leaf in expected.items():
    np.testing.assert_array_equal(loaded[path], leaf)
  floats = {
    p for p, x in loaded.items() if jnp.issubdtype(x.dtype, jnp.inexact)
  }
  assert floats == expected.keys()
  said = [w for w in merged.warnings if 'not in the output' in w]
  assert len(said) == (0 if is_known else 1)


def test_a_tuple_keeps_its_places(save, tmp_path):
  state = lambda i: (params(i), opt_state(ADAM, params(i), i), np.int32(7))
  paths = [save(f's{i}', state(i)) for i in range(2)]
  mk.merge_checkpoints(mk.average(), experts=paths, output=tmp_path / 'o')
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / 'o')
  assert restored[2] == 7
  mean = (params(0)['dense']['bias'] + params(1)['dense']['bias']) / 2
  np.testing.assert_array_equal(restored[0]['dense']['bias'], mean)


VARIATIONAL = lambda i: {'mu': params(i)['out'], 'logvar': params(i)['out']}
MODELS = {
  'towers': lambda i: {'encoder': params(i), 'decoder': params(i + 9)},
  'adversaries': lambda i: {'generator': params(i), 'critic': params(i + 9)},
  'numbered': lambda i: [params(i), params(i + 9)],
  'variational': lambda i: {'head': VARIATIONAL(i), 'out': params(i)['out']},
  # The name of a language model.
  'opt': lambda i: {'vit': params(i), 'opt': params(i + 9)},
  'opt alone': lambda i: {'opt': params(i)},
  'opt below a root': lambda i: {'params': {'opt': params(i)}},
  'opt beside a model below a root': lambda i: {
    'params': {'model': params(i), 'opt': params(i + 9)}
  },
  'opt beside a model': lambda i: {
    'both': {'model': params(i), 'opt': params(i + 9)}
  },
  # Of attention.
  'key': lambda i: {'model': params(i), 'key': params(i + 9)['out']},
  'below a root': lambda i: {'params': {'net': params(i), 'adam': params(i)}},
}


@pytest.mark.parametrize('name', MODELS)
def test_modules_that_are_alike_are_merged(save, tmp_path, name):
  paths = [save(f's{i}', MODELS[name](i)) for i in range(3)]
  report = mk.merge_checkpoints(
    mk.average(), base=paths[0], experts=paths[1:], output=tmp_path / 'o'
  )
  whole = checkpoints.leaves(MODELS[name](0))
  assert {tensor.path for tensor in report.tensors} == whole.keys()
  assert report.warnings == []


@pytest.mark.parametrize(
  'wrap,warned',
  [
    (lambda i: {'net': params(i), 'ema': params(i)}, 'ema is called like a'),
    (lambda i: {'online': params(i), 'target': params(i)}, 'target is called'),
    (lambda i: {'q': params(i), 'target_q': params(i)}, "'target_q/.*' by"),
    (
      lambda i: {'params': {'online': params(i), 'shadow': params(i)}},
      "'params/shadow/.*' by 'base'",
    ),
    (lambda i: {'net': params(i), 'target': {'x': params(i)}}, None),
    (lambda i: {'net': params(i), 'average_pool': params(i)['out']}, None),
  ],
)
def test_copies_are_merged_with_a_warning(save, tmp_path, wrap, warned):
  paths = [save(f's{i}', wrap(i)) for i in range(2)]
  report = mk.merge_checkpoints(
    mk.average(), experts=paths, output=tmp_path / 'o'
  )
  assert len(report.warnings) == (warned is not None)
  assert all(warned in warning for warning in report.warnings)


def test_looking_for_optimizers_is_linear(monkeypatch):
  """Each tensor of Hugging Face is a node of its own at the top."""
  spec = jax.ShapeDtypeStruct((2,), jnp.float32)
  is_merged, asked = roots.tree.is_merged, []

  def counted(dtype):
    asked.append(dtype)
    return is_merged(dtype)

  monkeypatch.setattr(roots.tree, 'is_merged', counted)
  leaves = {f'model.layers.{i}.weight': spec for i in range(500)}
  holds = roots.parameters(leaves, root='')
  assert all(map(holds, leaves)) and len(asked) < 5 * len(leaves)


BATCH_NORM = {'bn': {'mean_ema': {'average': np.ones(3, 'float32')}}}
# What is saved beside parameters, and which floats of it a model may need.
BESIDE = {
  'haiku': (
    lambda p: {'state': {**BATCH_NORM, 'counter': np.int32(1)}, 'step': 3},
    ['state/bn/mean_ema/average'],
  ),
  'averages': (
    lambda p: {'ema': {'out': p['out']}, 'params_ema': {'out': p['out']}},
    ['ema/out/kernel', 'params_ema/out/kernel'],
  ),
  'an average of optax': (
    lambda p: {'ema': {'count': np.int32(1), 'ema': {'w': p['out']['kernel']}}},
    ['ema/ema/w'],
  ),
  'modules that are called like training state': (
    lambda p: {'probe': {'key': p['out']}, 'data': {'mean': np.ones(3, 'f4')}},
    ['data/mean', 'probe/key/kernel'],
  ),
  'optax': (lambda p: {'state': opt_state(ADAM, p, 1)}, []),
  'T5X': (lambda p: {'state': {'step': 1.0, 'param_states': {'v': p}}}, []),
  'training': (
    lambda p: {
      'opt_state': opt_state(ADAM, p, 1),
      'opt': {'m': p},
      'step': 1.0,
      'rng': np.ones(2),
      'data': {'position': 0.5},
      'metrics': {'loss': np.float32(2)},
    },
    [],
  ),
}


@pytest.mark.parametrize('name', BESIDE)
def test_what_a_model_may_need_is_missed(save, tmp_path, name):
  beside, missed = BESIDE[name]
  path = save('s', {'params': params(0), **beside(params(0))})
  report = mk.merge_checkpoints(
    mk.average(), experts=[path], output=tmp_path / 'o'
  )
  assert {p.partition('/')[0] for p in checkpoints.load(tmp_path / 'o')} == {
    'params'
  }
  which = (
    '1 leaf of the base lies beside its parameters and is'
    if len(missed) == 1
    else f'{len(missed)} leaves of the base lie beside its parameters and are'
  )
  assert report.warnings == [
    f'{which} not in the output: {", ".join(missed)}.'
  ] * bool(missed)


def test_a_train_state_goes_without_a_warning(save, tmp_path):
  state = train_state.TrainState.create(
    apply_fn=jnp.sum, params=params(0), tx=CHAIN
  )
  for name, tree in {'alone': state, 'held': {'state': state}}.items():
    report = mk.merge_checkpoints(
      mk.average(), experts=[save(name, tree)], output=tmp_path / f'o_{name}'
    )
    assert report.warnings == [] and len(report.tensors) == 3


@pytest.mark.parametrize('given', ['step', 'item'])
def test_items_beside_the_parameters_are_named(tmp_path, given):
  """Where the item of the parameters was not asked for."""
  with ocp.CheckpointManager(tmp_path / 'saved') as manager:
    items = {
      'params': params(0),
      'batch_stats': params(1),
      'opt_state': [1],
      'state': BATCH_NORM,
    }
    save = {name: ocp.args.StandardSave(x) for name, x in items.items()}
    manager.save(5, args=ocp.args.Composite(**save))
  path = tmp_path / 'saved' / '5' / ('' if given == 'step' else 'params')
  report = mk.merge_checkpoints(
    mk.average(), experts=[path], output=tmp_path / 'o'
  )
  assert [w.split(' of ')[0] for w in report.warnings] == (
    ['The item batch_stats', 'The item state'] if given == 'step' else []
  )


@pytest.mark.parametrize('path', ['batch_stats/mean', 'params/count'])
def test_an_override_of_what_is_not_merged(save, tmp_path, path):
  tree = {
    'params': params(0) | {'count': np.int32(3)},
    'batch_stats': {'mean': np.ones(3, 'float32')},
  }
  overrides = {path: 'base'}
  message = f"matches only what is not merged, such as '{path}'"
  with pytest.raises(ValueError, match=message):
    mk.merge(mk.average(), [tree], tree, overrides=overrides)
  with pytest.raises(ValueError, match=message):
    mk.merge_checkpoints(
      mk.average(),
      experts=[save('s', tree)],
      output=tmp_path / 'o',
      overrides=overrides,
    )


@pytest.mark.parametrize(
  'name,warned',
  [
    ('q_proj.lora_A.weight', True),
    ('layers/0/q/lora_b', True),
    ('q/lora_a/value', True),
    ('color_a/kernel', False),
  ],
)
def test_factors_of_adapters_are_merged_with_a_warning(tmp_path, name, warned):
  paths = [
    checkpoints.save_safetensors(
      tmp_path / f'{i}.safetensors', {name: np.full((2, 3), i, 'float32')}
    )
    for i in range(2)
  ]
  report = mk.merge_checkpoints(
    mk.average(), experts=paths, output=tmp_path / 'o'
  )
  said = [w for w in report.warnings if f'of LoRA adapters: {name}.' in w]
  assert len(said) == len(report.warnings) == warned


class TestInMemory:
  """The same leaves are merged as of checkpoints, to the same bits."""

  @pytest.mark.parametrize('root', STATES)
  def test_moments_are_the_base_s(self, root):
    wrap, is_known = STATES[root]
    base, *experts = (wrap(params(i), i) for i in range(3))
    method = mk.ties(density=0.3)
    if is_known:
      merged = mk.merge(method, experts, base)
    else:
      with pytest.warns(UserWarning, match='taken for what an optimizer keeps'):
        merged = mk.merge(method, experts, base)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    alone = mk.merge(method, [params(1), params(2)], params(0))
    expected = checkpoints.leaves(base) | {
      f'{root}/{path}': leaf for path, leaf in checkpoints.leaves(alone).items()
    }
    for path, leaf in checkpoints.leaves(merged).items():
      np.testing.assert_array_equal(leaf, expected[path])

  @pytest.mark.parametrize('name', OTHERS | REPEATED)
  def test_what_else_optax_keeps(self, name):
    """Beside one net, and beside the second of two that are alike."""

    def state(i):
      fresh = (OTHERS | REPEATED)[name].init(params(i))
      return jax.tree.map(lambda x: (x + 1e3 * i).astype(x.dtype), fresh)

    nets = lambda i: (params(i), params(i + 9))
    one = lambda i: (params(i), state(i))
    two = lambda i: (params(i), (params(i + 9), state(i)))
    wraps = {one: params, two: nets} if name in OTHERS else {one: params}
    for wrap, alone in wraps.items():
      base, *experts = map(wrap, range(3))
      with pytest.warns(UserWarning, match='taken for what an optimizer keeps'):
        merged = mk.merge(mk.ties(0.3), experts, base)
      expected = mk.merge(mk.ties(0.3), [alone(1), alone(2)], alone(0))
      tree = (merged[0], merged[1][0]) if wrap is two else merged[0]
      jax.tree.map(np.testing.assert_array_equal, tree, expected)
      kept = merged[1][1] if wrap is two else merged[1]
      jax.tree.map(np.testing.assert_array_equal, kept, state(0))

  def test_a_train_state_under_jit(self):
    state = lambda i: train_state.TrainState(
      step=i,
      apply_fn=jnp.sum,
      params=params(i),
      tx=ADAM,
      opt_state=opt_state(ADAM, params(i), i),
    )
    base, *experts = map(state, range(3))
    merged = jax.jit(lambda e, b: mk.merge(mk.average(), e, b))(experts, base)
    mean = (params(1)['out']['kernel'] + params(2)['out']['kernel']) / 2
    np.testing.assert_array_equal(merged.params['out']['kernel'], mean)
    nu = [x.opt_state[0].nu['out']['kernel'] for x in (merged, base)]
    np.testing.assert_array_equal(*nu)
    assert merged.step == 0

  def test_experts_without_an_optimizer(self):
    base = {'params': params(0), 'opt_state': ADAM.init(params(0))}
    merged = mk.merge(mk.average(), [{'params': params(1)}, params(1)], base)
    np.testing.assert_array_equal(
      merged['params']['out']['kernel'], params(1)['out']['kernel']
    )

  def test_what_nobody_knows_is_named(self):
    variables = lambda i: {
      'params': params(i),
      'batch_stats': {'mean': np.full(3, i, 'float32')},
    }
    with pytest.warns(UserWarning, match='not merged: batch_stats/mean'):
      merged = mk.merge(mk.average(), [variables(1)], variables(0))
    np.testing.assert_array_equal(merged['batch_stats']['mean'], np.zeros(3))

  def test_what_a_model_may_need_is_named(self):
    variables = {'params': params(0), 'state': BATCH_NORM, 'step': 1.0}
    with pytest.warns(UserWarning) as warned:
      mk.merge(mk.average(), [variables], variables)
    assert [str(w.message).partition(': ')[2] for w in warned] == [
      'state/bn/mean_ema/average.'
    ]

  def test_nothing_but_an_optimizer(self):
    state = opt_state(ADAM, params(0), 0)
    with pytest.raises(ValueError, match=r'experts\[0\] has nothing to merge'):
      mk.merge(mk.average(), [state, state])
