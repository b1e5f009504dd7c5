"""Peak memory of a streamed merge, in a process of its own.

The base and one expert lie on disk, 64 MB each, and the expert is listed four
times: the merge streams five models, and the tests write little.

Resident memory counts the pages of files that are mapped for reading, which
the kernel takes back whenever it likes; so `ru_maxrss` would say how large the
checkpoints are. What the merge needs is its anonymous memory, RssAnon, sampled
every two milliseconds. Buffers live for the whole merge, so no peak is shorter.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.jobs import job
from tests import checkpoints

MIB = 2**20
# What a first merge of a tiny model takes, imports and runtime, is subtracted.
# Compiling for the large shapes and the heaps of the threads of XLA and
# TensorStore come on top. With a budget of 64 MiB, 38 to 89 MiB were measured.
RUNTIME = 64 * MIB

PROGRAM = """
import json, pathlib, shutil, sys, threading, time

arguments = json.loads(sys.argv[1])
import mergekit_jax as mk

def anonymous():
  for line in open('/proc/self/status'):
    if line.startswith('RssAnon'):
      return 1024 * int(line.split()[1])

peak = 0
def sample():
  global peak
  while True:
    peak = max(peak, anonymous())
    time.sleep(0.002)

threading.Thread(target=sample, daemon=True).start()
rule = eval(arguments['rule'])
output = pathlib.Path(arguments['output'])
peaks = []
for base, expert in arguments['models']:
  peak = 0
  mk.merge_checkpoints(
    rule,
    base=base,
    experts=[expert] * 4,
    output=output,
    memory_budget=arguments['budget'],
    stacked_axes=arguments['stacked_axes'],
    overwrite=True,
  )
  peaks.append(peak)
if not arguments['keep']:
  shutil.rmtree(output)
print(json.dumps(peaks))
"""


def peaks_of(rule, models, output, budget, stacked_axes=None, keep=False):
  """Peaks of one merge after the other, in one process of eight devices."""
  arguments = {
    'rule': rule,
    'models': [[path and str(path) for path in pair] for pair in models],
    'output': str(output),
    'budget': budget,
    'stacked_axes': stacked_axes,
    'keep': keep,
  }
  finished = subprocess.run(
    [sys.executable, '-B', '-c', PROGRAM, json.dumps(arguments)],
    cwd=pathlib.Path(__file__).parents[1],
    # A heap for each thread would be fuller or emptier by chance, and programs
    # that another process has left take less memory to load than to compile.
    env={
      **os.environ,
      'MALLOC_ARENA_MAX': '1',
      'JAX_ENABLE_COMPILATION_CACHE': 'false',
    },
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert finished.returncode == 0, finished.stderr
  return json.loads(finished.stdout)


def save(path, shapes, seed):
  """Saves random bfloat16 leaves, each sharded over eight devices."""
  mesh = jax.make_mesh((8,), ('fsdp',))
  sharding = jax.NamedSharding(mesh, jax.P('fsdp'))
  random = np.random.default_rng(seed)
  tree = {
    name: jax.device_put(
      random.standard_normal(shape, np.float32).astype(jnp.bfloat16), sharding
    )
    for name, shape in shapes.items()
  }
  return checkpoints.save(path, {'params': tree})


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(base, expert) of a small model, one of 32 MB and one of 64 MB."""
  directory = tmp_path_factory.mktemp('large')
  leaf = (4096, 2048)  # 16 MB
  models = {
    'tiny': {'a': (256, 64)},
    'half': {name: leaf for name in 'ab'},
    'whole': {name: leaf for name in 'abcd'},
  }
  return [
    (save(directory / f'{name}0', s, 0), save(directory / f'{name}1', s, 1))
    for name, s in models.items()
  ]


@pytest.mark.parametrize(
  'rule',
  [
    'mk.task_arithmetic(0.3)',
    'mk.ties()',
    "mk.ties(scope='tensor')",
    'mk.dare_ties()',
  ],
)
def test_budget(saved, tmp_path, rule):
  """Within the budget, and a larger model needs no more than a smaller one.

  All five models take 320 MB, in float32 640 MB; the budget is 64 MiB.
  """
  budget = 64 * MIB
  # A process each: what one merge leaves in the heap must not count for both.
  small, half = peaks_of(rule, saved[:2], tmp_path / 'out', budget)
  tiny, whole = peaks_of(rule, saved[::2], tmp_path / 'out', budget)
  assert half - small < budget + RUNTIME, (small / MIB, half / MIB)
  assert whole - tiny < budget + RUNTIME, (tiny / MIB, whole / MIB)
  # Measured: 12 MiB less to 10 MiB more. The models differ by 160 MB.
  growth = (whole - tiny) - (half - small)
  assert growth < 20 * MIB, growth / MIB


@pytest.mark.parametrize('rule', ['mk.ties()', "mk.ties(scope='tensor')"])
def test_what_the_plan_says(saved, tmp_path, rule):
  """With room for larger boxes than it takes.

  Measured: 3 to 11 MiB less than the 132 and 228 of the plans.
  """
  tiny, whole = peaks_of(rule, saved[::2], tmp_path / 'out', '4GiB')
  base, expert = saved[2]
  method = eval(rule, {'mk': mk})
  planned = job.make_job([method], [expert] * 4, base).plan.host_bytes
  assert 0.75 * planned < whole - tiny < planned + RUNTIME


def test_leaf_larger_than_the_budget(tmp_path):
  """A stack of 100 MB, listed four times, with a budget of 64 MiB."""
  shapes = {'layers': (2048, 8, 3072)}
  path = save(tmp_path / 'expert', shapes, 0)
  small = save(tmp_path / 'small', {'layers': (256, 2, 64)}, 0)
  budget = 64 * MIB
  output = tmp_path / 'out'
  tiny, peak = peaks_of(
    'mk.average()',
    [(None, small), (None, path)],
    output,
    budget,
    {'.*/layers': 1},
    keep=True,
  )
  assert peak - tiny < budget + RUNTIME, (tiny / MIB, peak / MIB)
  assert checkpoints.report_of(output)['units_done'] > 4
  merged, expected = map(checkpoints.load, (output, path))
  assert (
    merged['params/layers'].tobytes() == expected['params/layers'].tobytes()
  )
