"""Merges compiled for TPUs and GPUs that are not there, by their own compilers.

Nothing runs so: what comes out of the same programs is tested on CPUs.
"""

import collections
import math
import os
import pathlib
import subprocess
import sys

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.command import flags
from mergekit_jax.command.parser import parse
from mergekit_jax.forecasting import compiled, described, topology
from mergekit_jax.jobs import job as jobs
from mergekit_jax.sharding import make_mesh
from mergekit_jax.streaming import programs
from tests import cases, checkpoints

ROOT = pathlib.Path(__file__).parents[2]
# Neither rows nor layers of one are divided by eight devices.
SPECS = {
  'embedding': jax.ShapeDtypeStruct((4100, 256), 'bfloat16'),
  'layers/kernel': jax.ShapeDtypeStruct((256, 3, 8, 128), 'bfloat16'),
}
STACKED = {'layers/.*': 1}


# What the compiler asks of an H100.
GPU = """
platform_name: "CUDA"
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: 52428800  memory_bandwidth: 3352000000000
  device_memory_size: 80000000000
  runtime_version: "12.9.0"  driver_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
}
"""


@pytest.fixture(scope='module', autouse=True)
def little_effort():
  """A quarter of the time: what is compiled is not to be run."""
  before = jax.config.values['jax_exec_time_optimization_effort']
  jax.config.update('jax_exec_time_optimization_effort', -1.0)
  yield
  jax.config.update('jax_exec_time_optimization_effort', before)


@pytest.fixture(scope='module')
def tpus():
  pytest.importorskip(
    'libtpu', reason="TPU's compiler, of jax[tpu], is for Linux on x86-64"
  )
  return topology.tpus('v5e:2x4')


@pytest.fixture(scope='module')
def gpus():
  pytest.importorskip(
    'jax_plugins.xla_cuda12',
    reason='the compiler for GPUs, of jax-cuda12-pjrt, makes JAX complain of '
    'missing CUDA wherever it is installed without a GPU',
  )
  return topologies.get_topology_desc(
    platform='cuda', target_config=GPU, topology='1x1x8'
  ).devices


@pytest.fixture(scope='module', params=['tpus', 'gpus'])
def devices(request):
  return request.getfixturevalue(request.param)


def largest_of(mesh, rule, experts, specs=SPECS):
  stacked = STACKED if any('layers' in path for path in specs) else None
  plan = described.make_plan(
    specs, [rule], experts, mesh=mesh, stacked_axes=stacked
  )
  return compiled.compile_kernels(plan)


@pytest.mark.parametrize('case', cases.METHODS, ids=repr)
def test_streamed(devices, case):
  kernels = largest_of(make_mesh(None, devices), case.rule, case.experts)
  assert {kernel.path for kernel in kernels} == {*SPECS}
  rounds = [f'round {number + 1}' for number in range(case.rounds)]
  steps = [*rounds, 'merge', 'measure']
  assert [kernel.step for kernel in kernels] == steps * len(SPECS)
  for kernel in kernels:
    apart = kernel.step == 'merge'
    assert kernel.collectives == ({} if apart else {'all-reduce': 1})
    # No device holds the box as a whole, which lies on eight.
    models = 2 * (1 + case.experts) * math.prod(kernel.box.shape)
    assert kernel.device_bytes < models


@pytest.mark.parametrize(
  'dtype', ['float32', 'float16', 'float8_e4m3fn', 'float8_e5m2']
)
def test_streamed_dtypes(devices, dtype):
  specs = {'embedding': jax.ShapeDtypeStruct((1024, 256), dtype)}
  kernels = largest_of(make_mesh(None, devices), mk.average(), 2, specs)
  assert [kernel.step for kernel in kernels] == ['merge', 'measure']


def test_no_scatter(tpus):
  """Which a TPU does one element after another: histograms are products."""
  mesh = make_mesh(None, tpus)
  specs = {'embedding': SPECS['embedding']}
  plan = described.make_plan(specs, [mk.ties()], 2, mesh=mesh)
  ((rule, rounds, seen, tensor, _),) = compiled._largest_boxes(plan)
  steps = dict(programs.steps(plan, rule, rounds, seen, tensor))
  for number in (1, 2):
    text = steps[f'round {number}'].compile().as_text()
    assert ' convolution(' in text and ' scatter(' not in text


@pytest.mark.parametrize(
  ('case', 'kind'),
  [
    (case, AxisType.Explicit if case.family == 'threshold' else AxisType.Auto)
    for case in cases.FAMILIES
  ],
  ids=repr,
)
def test_in_memory(devices, case, kind):
  grid = np.array(devices).reshape(4, 2)
  mesh = Mesh(grid, ('fsdp', 'tensor'), axis_types=(kind,) * 2)
  specs = {
    'kernel': jax.P('fsdp', 'tensor'),
    'layers': jax.P('fsdp', None, None),
  }
  shapes = {'kernel': (512, 1024), 'layers': (256, 3, 512)}
  model = {
    path: jax.ShapeDtypeStruct(
      shape, 'bfloat16', sharding=NamedSharding(mesh, specs[path])
    )
    for path, shape in shapes.items()
  }

  @jax.jit
  def merge(rule, experts, base, key):
    return mk.merge(rule, experts, base, key=key, stacked_axes={'layers': 1})

  key = jax.eval_shape(jax.random.key, 0)
  with jax.set_mesh(mesh):
    lowered = merge.lower(case.rule, [model] * case.experts, model, key)
    program = lowered.compile()
  text = program.as_text() or ''
  found = collections.Counter(compiled._COLLECTIVE.findall(text))
  assert {*found} == ({'all-reduce'} if case.rounds else set())
  if kind == AxisType.Explicit:
    got = jax.tree.map(lambda x: x.spec, program.output_shardings)
    assert got == specs


def test_more_elements_than_32_bits_count(tpus):
  """In memory, where a leaf is not cut: a TPU has no product in int64."""
  place = NamedSharding(make_mesh(None, tpus), jax.P('fsdp'))
  model = [jax.ShapeDtypeStruct((2**16, 2**15), 'bfloat16', sharding=place)]
  merge = jax.jit(lambda experts, base: mk.merge(mk.ties(), experts, base))
  text = merge.lower([model] * 2, model).compile().as_text() or ''
  assert {*compiled._COLLECTIVE.findall(text)} == {'all-reduce'}


def test_saved_models(tpus, tmp_path):
  base, experts = checkpoints.save_set(
    tmp_path, {'embedding': (4100, 256)}, 'bfloat16', experts=2
  )
  mesh = make_mesh({'fsdp': 4, 'tensor': 2}, tpus)
  plan = jobs.make_job([mk.average()], experts, base, mesh=mesh).plan
  kernels = compiled.compile_kernels(plan)
  assert [kernel.step for kernel in kernels] == ['merge', 'measure']


def planned(*arguments):
  return parse(['', 'plan', '--model', '1b', '--experts', '2', *arguments])


@pytest.mark.usefixtures('tpus')
def test_program():
  """Of what libtpu says of a machine without TPUs nothing is seen."""
  finished = subprocess.run(
    [
      *(sys.executable, '-m', 'mergekit_jax', 'plan', '--model', '1b'),
      *('--method', 'average', '--experts', '2', '--topology', 'v5e:2x4'),
    ],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert finished.returncode == 0, finished.stderr
  assert 'mesh: fsdp=8, on 2 hosts\n' in finished.stdout
  assert 'kernels: 2 compiled for 8 devices (tpu)' in finished.stdout
  assert 'TPU' not in finished.stderr


def test_hosts_are_those_of_the_topology():
  arguments = planned('--method', 'average', '--topology', 'v5e:2x4')
  assert flags.imagined_devices(arguments) == 1
  arguments.hosts = 2
  with pytest.raises(ValueError, match='Leave --hosts out'):
    flags.imagined_devices(arguments)


@pytest.mark.parametrize('name', ['v5e', 'v5e:3x3', 'v99:2x2'])
@pytest.mark.usefixtures('tpus')
def test_no_such_topology(name):
  with pytest.raises(ValueError, match=f'{name}.* was given.*as v5e:16x16'):
    topology.tpus(name)


def test_not_installed(monkeypatch):
  def missing(*given, **options):
    raise RuntimeError('JAX TPU support not installed')

  monkeypatch.setattr(topologies, 'get_topology_desc', missing)
  with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'"):
    topology.tpus('v5e:2x4')
