"""Models without checkpoints, planned and compiled for a pod that is not there.

What is expected of the pod is worked out by hand from the sizes of the model.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import mergekit_jax as mk
from mergekit_jax import cli, sharding
from mergekit_jax.command import flags
from mergekit_jax.forecasting import described
from tests import pods

ROOT = pathlib.Path(__file__).parents[2]
NORMS = 161 * 8192
PARAMETERS = (
  80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 25_600)
  + 2 * 128_256 * 8192
  + NORMS
)


def run_program(*arguments):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'PYTHONWARNINGS': 'error::UserWarning',
  }
  return subprocess.run(
    [sys.executable, '-B', '-m', *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=500,
  )


class TestModels:
  @pytest.mark.parametrize(
    ('name', 'billions'),
    [('1b', 1), ('8b', 8), ('24b', 24), ('64b', 64), ('maxtext-64b', 64)],
  )
  def test_size(self, name, billions):
    model = described.model(name)
    assert model.parameters == pytest.approx(billions * 1e9, rel=0.03)
    assert {spec.dtype for spec in model.specs.values()} == {
      jnp.dtype('bfloat16')
    }

  def test_all_are_listed(self):
    assert [*described.MODELS] == ['1b', '8b', '24b', '64b', 'maxtext-64b']

  def test_scanned_holds_the_same(self):
    """Leaf by leaf, the layers of one are the stacked axis of the other."""
    flat, scanned = map(described.model, ('64b', 'maxtext-64b'))
    assert flat.parameters == scanned.parameters == PARAMETERS
    assert (len(flat.specs), len(scanned.specs)) == (80 * 9 + 3, 9 + 3)
    for path, spec in scanned.specs.items():
      if '/layers/' in path:
        assert spec.shape[1] == 80

  def test_unknown(self):
    with pytest.raises(ValueError, match="'65b'.*Did you mean '64b'"):
      described.model('65b')


class TestPlan:
  def plan(self, name='1b', **options):
    decoder = described.model(name)
    return described.make_plan(
      decoder.specs,
      [mk.ties()],
      2,
      mesh=sharding.make_mesh({'fsdp': 8}),
      stacked_axes=decoder.stacked_axes,
      **options,
    )

  def test_stacked_axes(self):
    (scope,) = self.plan('maxtext-64b').scopes
    for tensor in scope.tensors:
      assert tensor.stacked == ((1,) if '/layers/' in tensor.path else ())

  def test_overrides_and_dtype(self):
    plan = self.plan(overrides={'.*/embedding': 'base'}, dtype='float32')
    merged, copied = plan.scopes
    assert [tensor.path for tensor in copied.tensors] == [
      'params/embed/embedding'
    ]
    assert [len(t.sources) for t in copied.tensors] == [1]
    assert {tensor.sources for tensor in merged.tensors} == {
      (jnp.dtype('bfloat16'),) * 3
    }
    assert {t.dtype for t in merged.tensors} == {jnp.dtype('float32')}
    assert {t.dtype for t in copied.tensors} == {jnp.dtype('bfloat16')}

  def test_whole_numbers_are_copied(self):
    specs = {
      'step': jax.ShapeDtypeStruct((), jnp.int32),
      'w': jax.ShapeDtypeStruct((8, 8), jnp.float32),
    }
    mesh = sharding.make_mesh({'fsdp': 8})
    merged, copied = described.make_plan(
      specs, [mk.average()], 2, mesh=mesh
    ).scopes
    assert [tensor.path for tensor in merged.tensors] == ['w']
    assert [tensor.path for tensor in copied.tensors] == ['step']

  def test_hosts(self):
    """A host of two devices has a quarter to hold, and larger boxes fit."""
    counts = [
      sum(len(tensor.boxes) for tensor in self.plan(**of).scopes[0].tensors)
      for of in (
        {'memory_budget': '64MiB'},
        {'memory_budget': '64MiB', 'hosts': 4},
      )
    ]
    assert counts[0] > counts[1]


class TestPod:
  """64B parameters and 8 experts on 512 devices of 64 hosts."""

  @pytest.mark.parametrize(
    ('model', 'methods'),
    [
      ('64b', [*pods.METHODS]),
      ('maxtext-64b', ['task_arithmetic', 'dare_ties', 'ties over the tensor']),
    ],
  )
  def test_bounds(self, model, methods):
    finished = run_program('tests.pods', model, *methods)
    assert finished.returncode == 0, finished.stderr[-3000:]
    facts = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [fact['method'] for fact in facts] == methods
    for fact in facts:
      asks = 'over the' in fact['method']
      assert fact['rounds'] == 2 * asks
      # Every host reads its 64th of 9 models, and vectors as a whole.
      whole = 8192 if model == 'maxtext-64b' else NORMS
      of_host = (PARAMETERS - whole) // 64 + whole
      reads = 3 if 'over the model' in fact['method'] else 1
      assert fact['bytes'] == {
        'read': reads * 9 * 2 * of_host,
        'written': 2 * of_host,
      }
      assert fact['host_memory'] <= fact['memory_budget'] == 2**32
      # The largest box takes more than half of 72 MiB in nine models, of which
      # each of the eight devices of a host holds its part.
      least = 36 * 2**20 // 8
      assert least < fact['device_memory'] < 16e9
      rounds = ['round 1', 'round 2'] if asks else []
      steps = [*rounds, 'merge', 'measure']
      assert fact['steps'] == steps * (len(fact['steps']) // len(steps))
      for step, collectives in zip(
        fact['steps'], fact['collectives'], strict=True
      ):
        apart = step == 'merge'
        assert collectives == ({} if apart else {'all-reduce': 1})

  def test_smaller_models(self):
    sizes = (1, 8, 24)
    methods = ['ties over the model', 'dare_ties']
    models = ','.join(f'{billions}b' for billions in sizes)
    finished = run_program('tests.pods', models, *methods)
    assert finished.returncode == 0, finished.stderr[-3000:]
    expected = itertools.product(sizes, (3, 1))
    for line, (billions, reads) in zip(
      finished.stdout.splitlines(), expected, strict=True
    ):
      fact = json.loads(line)
      written = fact['bytes']['written']
      # In bfloat16; what a model is called is its size to a few percent.
      assert written * 64 / 2e9 == pytest.approx(billions, rel=0.05)
      assert fact['bytes']['read'] == reads * 9 * written
      assert fact['host_memory'] <= fact['memory_budget']
      assert fact['device_memory'] < 16e9
      kinds = {kind for found in fact['collectives'] for kind in found}
      assert kinds == {'all-reduce'}


class TestProgram:
  def test_table(self, tmp_path):
    """64 devices: more than there are cores, and fewer than a leaf has rows."""
    finished = run_program(
      *('mergekit_jax', 'plan', '--model', '1b', '--experts', '2'),
      *('--method', 'average', '--mesh', 'fsdp=64', '--hosts', '16'),
      *('--bandwidth', '2GB/s'),
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0] == (
      '1b: 1,011,959,808 parameters in bfloat16; a base and 2 experts'
    )
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:14]}
    assert rows['params/layers_*/mlp/down/kernel'] == [
      *('20', '[5632,', '2048]', '-', '1', '1', 'fsdp,-')
    ]
    assert rows['params/norm/scale'] == [*('1', '[2048]', '-', '1', '1', '-')]
    assert 'mesh: fsdp=64, on 16 hosts' in lines
    assert (
      '183 tensors merged, 0 copied, in 183 boxes and 183 reads of a box'
      in lines
    )
    (compiled,) = [line for line in lines if line.startswith('kernels: ')]
    assert 'for 64 devices (cpu), with 0 all-gather' in compiled
    # The vectors, 41 of 2048, are read by every host.
    of_host = 3 * 2 * ((1_011_959_808 - 41 * 2048) // 16 + 41 * 2048)
    (seconds,) = [line for line in lines if line.startswith('seconds: ')]
    assert seconds.startswith(f'seconds: {of_host / 2e9:.1f} at least')

  @pytest.mark.parametrize(
    ('arguments', 'message'),
    [
      (['--model', '64b', '--experts', '8'], 'mesh of all of them'),
      (['--hosts', '4', '--experts', 'a'], 'mesh of all of them'),
      (
        ['--model=64b', '--experts=8', '--mesh=fsdp=256', '--hosts=7'],
        '--hosts 7 was given for the 256 devices',
      ),
      (
        ['--model=64b', '--experts=8', '--mesh=fsdp=4', '--hosts=0'],
        'divides them',
      ),
    ],
  )
  def test_mistakes(self, arguments, message):
    parsed = cli.parse(['', 'plan', '--method', 'ties', *arguments])
    with pytest.raises(ValueError, match=message):
      flags.imagined_devices(parsed)

  @pytest.mark.parametrize(
    ('arguments', 'message'),
    [
      (['--experts', 'a', 'b'], 'the number of experts'),
      (['--experts', 'a'], 'whole number'),
      (['--experts', '0'], 'at least 1'),
      (['--experts', '2', '--base', 'a'], 'give no --base'),
    ],
  )
  def test_mistakes_about_experts(self, arguments, message):
    parsed = cli.parse(
      ['', 'plan', '--method', 'ties', '--model', '1b', *arguments]
    )
    with pytest.raises(ValueError, match=message):
      flags.number_of_experts(parsed)

  def test_bandwidth(self):
    assert flags.bandwidth('2GB/s') == flags.bandwidth('2GB') == 2 * 10**9
    assert flags.bandwidth(None) is None
    with pytest.raises(ValueError, match='bandwidth'):
      flags.bandwidth('fast')
