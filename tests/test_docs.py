"""The code of the documents runs."""

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys

import flax
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import optax
import orbax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import mergekit_jax as mk
from mergekit_jax import cli
from mergekit_jax.command import flags

ROOT = pathlib.Path(__file__).parent.parent


def python_blocks(name):
  text = (ROOT / name).read_text(encoding='utf-8')
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


@pytest.fixture
def models():
  random = np.random.default_rng(0)
  base = {'w': jnp.asarray(random.standard_normal((4, 6)), jnp.float32)}
  experts = [
    {'w': base['w'] + 0.1 * random.standard_normal((4, 6)).astype('float32')}
    for _ in range(2)
  ]
  return base, experts


def test_adding_a_method(models):
  """Every example but the library's own code and the row of a table."""
  base, experts = models
  names = {'mk': mk, 'jnp': jnp, 'base': base, 'experts': experts}
  _, clip, slerp, helper, _ = python_blocks('docs/adding_a_method.md')
  exec(clip, names)
  w, (a, b) = np.asarray(base['w'], np.float64), [e['w'] for e in experts]
  clipped = [np.clip(np.asarray(x - base['w']), -0.01, 0.01) for x in (a, b)]
  # Values of about 1 after a few roundings in float32, some near 0.
  np.testing.assert_allclose(
    names['merged']['w'], w + 0.3 * sum(clipped), rtol=1e-6, atol=1e-7
  )
  exec(slerp, names)
  middle = mk.merge(names['Slerp'](0.5), experts)['w']
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
  expected = np.sin(angle / 2) / np.sin(angle) * (a + b)
  # The page's rule takes the angle in float32, from a cosine near 1.
  np.testing.assert_allclose(middle, expected, rtol=1e-5, atol=1e-6)
  # Nor does it need norms whose squares fit a float32 twice.
  for scale in (1e-12, 1e12):
    scaled = [{'w': np.float32(scale * x)} for x in (a, b)]
    got = mk.merge(names['Slerp'](0.5), scaled)['w']
    # As above: the angle is in float32, whatever the scale.
    np.testing.assert_allclose(got / scale, expected, rtol=1e-5, atol=1e-6)
  exec(helper, names)

  @mk.rule
  class Mean:
    def __call__(self, t):
      return (yield from names['mean_magnitude'](t.experts[0]))

  got = mk.merge(Mean(), experts[:1])['w']
  # An answer comes back in float32.
  np.testing.assert_allclose(got, np.abs(a).mean(), rtol=1e-6)


def test_readme_example(models, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  base, experts = models
  stack = lambda tree: {'params': {'layers': jax.tree.map(lambda x: x, tree)}}
  with ocp.StandardCheckpointer() as checkpointer:
    for name, tree in zip(
      ('base', 'math', 'code'), (base, *experts), strict=True
    ):
      checkpointer.save(tmp_path / 'ckpts' / name, stack(tree))
  names = {'base': base, 'expert_1': experts[0], 'expert_2': experts[1]}
  example, training, sweeps, on = python_blocks('README.md')
  assert python_blocks('docs/checkpoints.md')[0] == on
  exec(example, names)
  with ocp.StandardCheckpointer() as checkpointer:
    streamed = checkpointer.restore(tmp_path / 'ckpts' / 'merged')
  expected = mk.merge(mk.ties(), [stack(e) for e in experts], stack(base))
  np.testing.assert_array_equal(
    streamed['params']['layers']['w'], expected['params']['layers']['w']
  )
  assert names['merged']['w'].shape == (4, 6)

  names['loss_fn'] = lambda tree, batch: jnp.sum(tree['w'] * batch)
  exec(training, names)
  batch = jnp.arange(24.0).reshape(4, 6)
  loss, gradient = names['step'](0.5, experts, base, batch)
  delta = sum(expert['w'] - base['w'] for expert in experts)
  merged = np.float64(base['w']) + 0.5 * np.float64(delta)
  # Sums of 24 terms in float32, some of which cancel.
  np.testing.assert_allclose(loss, np.sum(merged * batch), rtol=1e-5)
  np.testing.assert_allclose(gradient, np.sum(delta * batch), rtol=1e-5)

  def check_scales_of_parts(parts):
    merge = names['merge_by_part']
    rooted = [*map(parts, experts)]
    total = lambda scales: sum(
      leaf.sum() for leaf in jax.tree.leaves(merge(scales, rooted, parts(base)))
    )
    for slope in jax.grad(total)({'a': 0.5, 'b': 0.1}).values():
      # A sum of 48 differences in float32.
      np.testing.assert_allclose(slope, np.sum(np.float64(delta)), rtol=1e-5)

  check_scales_of_parts(lambda tree: {'a': tree, 'b': tree})
  check_scales_of_parts(lambda tree: {'model': {'a': tree, 'b': tree}})
  # What has no scale of its own stays as it is in the base.
  tree = lambda of: {'a': of, 'head': of}
  kept = names['merge_by_part']({'a': 0.5}, [*map(tree, experts)], tree(base))
  np.testing.assert_array_equal(kept['head']['w'], base['w'])

  names |= {
    'orbax': orbax,
    'TrainState': train_state.TrainState,
    'apply': jnp.sum,
    'params': jax.tree.map(jnp.zeros_like, stack(base)['params']),
    'tx': optax.sgd(0.5),
  }
  exec(on, names)
  ones = jax.tree.map(jnp.ones_like, names['state'].params)
  trained = names['state'].apply_gradients(grads=ones).params['layers']['w']
  np.testing.assert_array_equal(
    trained, streamed['params']['layers']['w'] - 0.5
  )

  names |= {'mk': mk, 'evaluate': lambda tree: tree['params']['layers']['w']}
  exec(sweeps, names)
  for scale, merged in names['scores'].items():
    expected = mk.merge(mk.task_arithmetic(scale), experts, base)
    np.testing.assert_array_equal(merged, expected['w'])
  assert (tmp_path / 'ckpts' / 'low').is_dir()
  assert (tmp_path / 'ckpts' / 'high').is_dir()


def test_training_on_other_devices(tmp_path):
  """As README says, on one device of models that were saved from eight."""
  spread = NamedSharding(jax.make_mesh((8,), ('x',)), jax.P('x'))
  paths = [tmp_path / name for name in ('base', 'a', 'b')]
  with ocp.StandardCheckpointer() as checkpointer:
    for number, path in enumerate(paths):
      leaf = jax.device_put(jnp.full((16, 2), number, jnp.bfloat16), spread)
      checkpointer.save(path, {'params': {'w': leaf}})
  output = tmp_path / 'merged'
  mk.merge_checkpoints(
    mk.average(), experts=paths[1:], base=paths[0], output=output
  )
  on = python_blocks('README.md')[-1]
  program = f"""
import types
from flax.training.train_state import TrainState
import jax, jax.numpy as jnp, optax, orbax.checkpoint
report = types.SimpleNamespace(output={str(output)!r})
params, apply, tx = {{'w': jnp.zeros((16, 2))}}, None, optax.sgd(0.1)
{on}
(leaf,) = jax.tree.leaves(state.params)
assert len(jax.devices()) == len(leaf.sharding.device_set) == 1
assert leaf.dtype == jnp.float32 and (leaf == 1.5).all()
"""
  environment = {**os.environ, 'XLA_FLAGS': ''}
  subprocess.run([sys.executable, '-c', program], env=environment, check=True)


def test_nnx(tmp_path):
  """Twelve blocks: as text, '10' and '11' come before '2'."""

  class Model(nnx.Module):
    def __init__(self, seed):
      layer = functools.partial(nnx.Linear, 3, 3, rngs=nnx.Rngs(seed))
      self.blocks = nnx.List([layer() for _ in range(12)])

  base, *experts = [nnx.state(Model(seed)) for seed in range(3)]
  paths = [tmp_path / name for name in ('base', 'a', 'b')]
  with ocp.StandardCheckpointer() as checkpointer:
    for path, state in zip(paths, (base, *experts), strict=True):
      checkpointer.save(path, state)
  sources = {'experts': paths[1:], 'base': paths[0]}
  report = mk.merge_checkpoints(
    mk.average(), **sources, output=tmp_path / 'merged'
  )
  mean = lambda *kernels: np.mean(np.float64(kernels), axis=0)
  expected = jax.tree.map(mean, *experts)

  def check(state):
    assert jax.tree.structure(state) == jax.tree.structure(base)
    for got, want in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
      # The sum is rounded to float32, by 2**-24 at most; its half is exact.
      np.testing.assert_allclose(got, want, rtol=2**-23)

  names = {'nnx': nnx, 'orbax': orbax, 'report': report}
  names |= {'flax': flax, 'functools': functools, 'jax': jax}
  names['make_model'] = lambda: Model(0)
  _, restoring, by_path = python_blocks('docs/checkpoints.md')
  exec(restoring, names)
  check(nnx.state(names['model']))
  exec(by_path, names)
  as_state = lambda tree: names['as_state'](tree, base)
  check(mk.sweep({'mean': mk.average()}, **sources, evaluate=as_state)['mean'])
  check(mk.merge(mk.average(), experts, base))


def test_readme_for_who_comes_from_another_library(tmp_path):
  """What it says to do about leaves that not all have, and to save a merge."""
  readme = (ROOT / 'README.md').read_text(encoding='utf-8')
  section = readme.partition('## Coming from another library')[2]
  (override,) = re.findall(r'`(--override\s[^`]*inv_freq[^`]*)`', section)
  (as_numpy,) = re.findall(r'`({k: np[^`]*)`', section)
  leaf = lambda value: np.full((2, 3), value, np.float32)
  held = {
    'base': {'w': leaf(1), 'lm_head.weight': leaf(2)},
    'a': {'w': leaf(3), 'lm_head.weight': leaf(4), 'rotary.inv_freq': leaf(5)},
    'b': {'w': leaf(5)},
  }
  paths = {}
  for name, leaves in held.items():
    (tmp_path / name).mkdir()
    save_file(leaves, tmp_path / name / 'model.safetensors')
    paths[name] = str(tmp_path / name)
  command = ['', 'merge', '--method=average', '--base', paths.pop('base')]
  command += ['--experts', *paths.values(), '--output', str(tmp_path / 'out')]

  def merge(*more):
    arguments = cli.parse([*command, *more])
    what = flags.what_to_merge(arguments)
    given = flags.outputs(arguments, what.pop('methods'))
    mk.merge_checkpoints(**given, **what)

  with pytest.raises(ValueError, match='differ in 2 places'):
    merge()
  merge(*shlex.split(override))
  written = load_file(tmp_path / 'out' / 'model.safetensors')
  assert written.keys() == held['base'].keys()
  np.testing.assert_array_equal(written['w'], leaf(4))
  np.testing.assert_array_equal(written['lm_head.weight'], leaf(2))

  for place in ('out.report.json', 'out/model.safetensors'):
    assert paths['a'].encode() in (tmp_path / place).read_bytes()

  merged = mk.merge(mk.average(), [{'w': leaf(3)}, {'w': leaf(5)}])
  save_file(eval(as_numpy, {'np': np, 'merged': merged}), tmp_path / 'saved')
  np.testing.assert_array_equal(load_file(tmp_path / 'saved')['w'], leaf(4))
