"""The benchmarks do what their figures say; no figure itself is tested."""

import json
import pathlib
import platform
import re
import sys

import jax
from jax.sharding import AxisType
import numpy as np
import pytest

from experiments.benchmarks import (
  floor,
  kernels,
  many,
  measuring,
  mergekit,
  merges,
  planning,
  scaling,
  start_up,
)
import mergekit_jax as mk
from mergekit_jax.command import flags, parser
from tests.reference import expert_bits

MIB = 2**20


@pytest.fixture(autouse=True)
def no_memory_is_touched(monkeypatch):
  """What matters to a benchmark takes longer than these tests."""
  monkeypatch.setattr(measuring, 'touch_memory', lambda: None)


def characters_read():
  """Bytes that read calls of this process have given it."""
  lines = pathlib.Path('/proc/self/io').read_text().splitlines()
  return int(dict(line.split(': ') for line in lines)['rchar'])


class TestMeasuring:
  def test_memory_and_output_of_a_command(self):
    program = (
      f'import time; x = b"x" * {64 * MIB}; time.sleep(0.1); print("hi")'
    )
    cost = measuring.run([sys.executable, '-c', program])
    assert cost.output == 'hi\n'
    assert 64 * MIB < cost.peak_bytes < 128 * MIB
    assert 0 < cost.cpu_seconds

  def test_two_commands_and_their_environment(self):
    program = 'import os, sys; print(os.environ["X"] + sys.argv[1])'
    call = [sys.executable, '-c', program]
    costs = measuring.run_together([[*call, '1'], [*call, '2']], {'X': 'x'})
    assert [cost.output for cost in costs] == ['x1\n', 'x2\n']

  def test_a_command_that_fails_says_why(self):
    with pytest.raises(RuntimeError, match='no such thing'):
      measuring.run([sys.executable, '-c', 'raise SystemExit("no such thing")'])

  def test_figures(self, tmp_path, monkeypatch, capsys):
    """They say how they were made, and not where."""
    file = tmp_path / 'figures.json'
    arguments = ['--json', str(file), '--gigabytes', '2', '--folder', '/secret']
    monkeypatch.setattr(sys, 'argv', ['floor', *arguments])
    rows = [{'method': 'ties', 'seconds': 1.25}, {'method': 'dare', 'more': 3}]
    measuring.publish('floor', rows, str(file), fact=7)
    figures = json.loads(file.read_text())
    assert figures['command'] == (
      'python -m experiments.benchmarks.floor --gigabytes 2'
    )
    assert len(figures['commit'].rstrip('+')) == 12
    assert {'cores', 'memory_gib', 'python', 'jax'} <= set(figures['machine'])
    processor = figures['machine']['processor']
    cpus = pathlib.Path('/proc/cpuinfo').read_text()
    for word, name in [('family', 'cpu family'), ('stepping', 'stepping')]:
      number = re.search(rf'^{name}\s*: (\d+)$', cpus, re.MULTILINE)
      assert number is None or f'{word} {number[1]}' in processor
    assert figures['fact'] == 7
    assert figures['rows'] == rows
    monkeypatch.setattr(sys, 'argv', ['floor', '--folder=/secret', '--more'])
    assert measuring.command('floor') == (
      'python -m experiments.benchmarks.floor --more'
    )
    for secret in (platform.node(), str(measuring.ROOT), '/secret'):
      assert secret not in file.read_text()
    assert capsys.readouterr().out.splitlines() == [
      'method  seconds  more',
      '  ties     1.25      ',
      '  dare              3',
      'fact: 7',
    ]

  def test_medians(self):
    rows = [{'a': 9.0, 'b': 1}, {'a': 2.0, 'b': 1}, {'a': 3.0, 'b': 1}]
    assert measuring.medians(rows) == {'a': 3.0, 'b': 1}


class TestFloor:
  SIZES = {'base': (MIB + 17,), 'expert_1': (3 * MIB, 5), 'expert_2': (0, 99)}

  @pytest.fixture
  def models(self, tmp_path):
    for name, sizes in self.SIZES.items():
      for i, size in enumerate(sizes):
        file = tmp_path / name / 'd' / str(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b'x' * size)
    return [tmp_path / name for name in self.SIZES]

  @pytest.mark.parametrize('reads', [1, 3])
  @pytest.mark.parametrize('threads', [1, 2])
  def test_moves_every_byte(self, models, tmp_path, reads, threads):
    files = [f for model in models for f in model.rglob('*') if f.is_file()]
    expected = sum(file.stat().st_size for file in files) * reads
    written = 2 * MIB + 3
    before = characters_read()
    moved = floor.move(files, reads, written, tmp_path / 'out', threads)
    # The other reads of this process are those of its counters.
    assert 0 <= characters_read() - before - expected < 2**14
    assert moved.bytes == expected + written
    made = list((tmp_path / 'out').iterdir())
    assert len(made) == threads
    assert sum(file.stat().st_size for file in made) == written

  @pytest.mark.parametrize('name', ['average', 'ties model', 'dare'])
  def test_of_a_method(self, models, tmp_path, name):
    """The average needs no base; TIES over the model reads all three times."""
    base, *experts = (sum(sizes) for sizes in self.SIZES.values())
    expected = {
      'average': sum(experts),
      'ties model': 3 * (base + sum(experts)),
      'dare': base + sum(experts),
    }
    method = merges.METHODS[name]
    row = floor.floor_of(method, models, MIB, tmp_path / 'out')
    moved = row['floor_gb_per_second'] * row['floor_seconds'] * 1e9
    assert moved == pytest.approx(expected[name] + MIB, abs=0.5)
    assert not (tmp_path / 'out').exists()


def test_compile_seconds():
  """Parts of one another count once: 1 to 4 and 5 to 6 seconds past."""
  line = (
    'W1122 10:00:{} 1 dispatch.py:204] Finished tracing f for jit in {} sec'
  )
  lines = [line.format('02.00', 1), line.format('04.00', '3e+00')]
  lines += ['I1122 10:00:09.50 1 other.py:1] Finished', line.format('06.0', 1)]
  assert merges.compile_seconds('\n'.join(lines)) == pytest.approx(4)


def test_scaling_varies_one_quantity_at_a_time():
  cases = list(scaling.cases([0.1, 1, 4], 1))
  assert {c.gigabytes for c in cases} == {0.1, 1, 4}
  assert {c.experts for c in cases} == {2, 4, 8}
  assert {c.devices for c in cases} == {1, 2, 4}
  assert {c.processes for c in cases} == {1, 2}
  middle = scaling.Case(1)
  for case in cases:
    changed = [
      name for name in vars(case) if vars(case)[name] != vars(middle)[name]
    ]
    assert len(changed) <= 1


def test_the_first_turn_of_scaling_only_compiles(tmp_path, monkeypatch):
  quantities = ('command_seconds', 'merge_seconds', 'cpu_seconds', 'peak_mib')
  begun = []

  def merge(*arguments):
    begun.append(arguments)
    cold = 100 if len(begun) == 1 else 0
    return {'bytes_read': 8e9} | dict.fromkeys(quantities, cold + len(begun))

  monkeypatch.setattr(merges, 'merge', merge)
  row = scaling.measure(scaling.Case(1), 'dare', ['b'] * 5, tmp_path, [], 2)
  assert len(begun) == 3
  assert [row[name] for name in quantities] == [2.5] * 4
  assert row['gb_per_second'] == 8 / 2.5


def test_start_up_begins_every_turn_with_an_empty_cache(tmp_path, monkeypatch):
  homes = []

  def run(command, environment):
    home = pathlib.Path(environment['XDG_CACHE_HOME'])
    assert environment['JAX_COMPILATION_CACHE_DIR'] == ''
    assert command[command.index('--method=average') :] == (
      ['--method=average', '--experts', 'e', 'f', '--output', command[-1]]
    )
    homes.append(home)
    kept = home / 'mergekit_jax'
    is_cold = not kept.exists()
    kept.mkdir(parents=True, exist_ok=True)
    for name in ('a-cache', 'a-atime', 'b-cache'):
      (kept / name).touch()
    return measuring.Cost(2.0 if is_cold else 1.0, 3.0, 0, '')

  monkeypatch.setattr(measuring, 'run', run)
  models = [pathlib.Path(name) for name in 'bef']
  for i in range(2):
    assert start_up.turn('average', models, tmp_path / str(i)) == {
      'cold_seconds': 2,
      'cold_cpu_seconds': 3,
      'warm_seconds': 1,
      'warm_cpu_seconds': 3,
      'programs': 2,
      'programs_added': 0,
    }
  assert homes == [tmp_path / '0'] * 2 + [tmp_path / '1'] * 2


@pytest.fixture(scope='module')
def work():
  devices = jax.devices()[:2]
  auto = (AxisType.Auto,)
  mesh = jax.make_mesh((2,), ('fsdp',), axis_types=auto, devices=devices)
  return kernels.all_work(2, 2**15, mesh)


def test_scaling_from_two_experts_to_eight():
  row = {'method': 'ties', 'experts': 2, 'gigabytes_read': 3}
  two = {**row, 'merge_seconds': 2.0, 'peak_mib': 500}
  four = {**two, 'experts': 4, 'peak_mib': 1}
  eight = {**two, 'experts': 8, 'gigabytes_read': 9, 'merge_seconds': 7.0}
  assert scaling.growth([two, four, eight]) == {
    'ties': {'gigabytes_read': 3.0, 'merge_seconds': 3.5, 'peak_mib': 1.0}
  }


class TestKernels:
  def test_bytes_that_must_move(self, work):
    """Of two experts and a base in bfloat16; magnitudes are of float32."""
    elements = {item.elements for item in work.values()}
    assert elements == {2**15}
    assert {name: item.bytes / 2**15 for name, item in work.items()} == {
      'average': 2 + 2 + 2,
      'task_arithmetic': 2 + 2 + 2 + 2,
      'ties tensor': 3 * (2 + 2 + 2) + 2,
      'ties model': 3 * (2 + 2 + 2) + 2,
      'dare': 2 + 2 + 2 + 2,
      'dare_ties': 2 + 2 + 2 + 2,
      'k-th magnitude': 4 + 4,
      'masks': 2,
    }

  def test_row(self, work):
    row = kernels.row('average', work['average'], 1e9, 1)
    assert (row['bytes_per_element'], row['predicted_ns']) == (6, 6)
    assert row['ratio'] == pytest.approx(row['measured_ns'] / 6)
    assert row['measured_ns'] > 0

  def test_the_copy_is_counted_in_both_directions(self, monkeypatch):
    monkeypatch.setattr(kernels, 'seconds_of', lambda run, repeats: 0.5)
    assert kernels.copy_bandwidth(1000, 3, 1) == 2 * 999 / 0.5

  def test_threshold(self):
    values = np.random.default_rng(0).standard_normal((2, 4096), np.float32)
    merged = mk.merge(kernels.Threshold(0.25), [{'x': values}])['x']
    expected = np.partition(np.abs(values), -2048, axis=None)[-2048]
    assert np.unique(merged).tolist() == [expected]

  def test_masks(self):
    zeros = {'x': np.zeros((8, 4096), np.float32)}
    merged = mk.merge(kernels.Masks(0.75), [zeros] * 3, key=5)['x']
    bits = np.asarray(merged).astype(int)
    for expert in range(3):
      random = expert_bits(jax.random.key(5), 'x', (8, 4096), expert)
      kept = random >= 0.75 * 65536
      np.testing.assert_array_equal(bits >> expert & 1, kept)


def test_what_mergekit_is_told():
  models = [pathlib.Path(name) for name in ('b', 'e', 'f')]
  told = json.loads(mergekit.configuration('ties tensor', models))
  assert told == {
    'merge_method': 'ties',
    'base_model': 'b',
    'models': [{'model': name, 'parameters': {'weight': 1.0}} for name in 'ef'],
    'parameters': {'density': 0.2, 'normalize': True},
    'dtype': 'bfloat16',
  }
  told = json.loads(mergekit.configuration('dare_ties', models))
  rate = mergekit.DROP_RATE
  assert told['parameters'] == {
    'density': pytest.approx(1 - rate),
    'rescale': False,
    'lambda': pytest.approx(1 / (1 - rate)),
    'normalize': True,
  }
  told = json.loads(mergekit.configuration('average', models))
  assert 'base_model' not in told
  assert [m['parameters']['weight'] for m in told['models']] == [0.5, 0.5]


class TestMany:
  """One command writes what the others write, and reads less."""

  @pytest.mark.parametrize('name', many.SWEEPS)
  def test_the_same_merges(self, name):
    def rules(told):
      paths = ['--base=b', '--experts', 'e', 'f', '--output=o']
      given = flags.what_to_merge(
        parser.parse(['mergekit-jax', 'merge', *told, *paths])
      )
      return [repr(rule) for rule in given['methods'].values()]

    sweep, singles = many.SWEEPS[name]
    apart = [rule for told in singles for rule in rules(told)]
    assert rules(sweep) == apart
    assert len(set(apart)) == len(singles) > 1

  def test_a_row(self, tmp_path, monkeypatch):
    """The first turn does not count; commands of one merge are added up."""
    sweep = (['--method', 'average', 'dare'], [['--method=average']] * 2)
    monkeypatch.setitem(many.SWEEPS, 'two', sweep)
    monkeypatch.setattr(start_up, 'SHAPES', {'embedding': (8, 4)})
    monkeypatch.setattr(merges, 'LAYERED', ())
    models = start_up.save_orbax(tmp_path)
    row = many.measure('two', models, tmp_path, repeats=1)
    assert row['merges'] == 2
    assert row['together_gb'] == pytest.approx(3 * 64e-9)
    assert row['apart_gb'] == pytest.approx(2 * 3 * 64e-9)
    assert row['times_faster'] == (
      row['apart_seconds'] / row['together_seconds']
    )
    assert {path.name for path in tmp_path.iterdir()} == {
      'cache',
      *(model.name for model in models),
    }


class TestPlanning:
  """Of tensors, none is planned twice or left out, whatever its shape."""

  def test_shapes(self):
    number = 5000
    kinds = {
      name: len({shape(i) for i in range(number)})
      for name, shape in planning.SHAPES.items()
    }
    assert kinds == {'alike': 1, 'unlike': number, 'unlike, large': number}

  @pytest.mark.parametrize('case', planning.SHAPES)
  def test_described(self, case):
    said = planning.plan(planning.specs(30, planning.SHAPES[case]))
    assert '30 tensors merged, 0 copied, in 30 boxes and 90 reads' in said

  def test_large_ones_are_cut(self):
    shape = planning.SHAPES['unlike, large'](50_000)
    said = planning.plan(planning.specs(2, lambda i: shape))
    assert '2 tensors merged' in said
    assert 'in 2 boxes' not in said

  def test_rows(self, tmp_path, monkeypatch):
    """The files are planned by the command line, and deleted."""
    said = []
    run = measuring.run

    def spy(command):
      said.append(run(command))
      return said[-1]

    monkeypatch.setattr(measuring, 'run', spy)
    rows = planning.measure(5, 1, str(tmp_path))
    assert [row['case'] for row in rows] == [*planning.SHAPES, 'files']
    assert all(row['cpu_seconds'] > 0 for row in rows)
    assert '5 tensors merged, 0 copied' in said[0].output
    assert not [*tmp_path.iterdir()]
