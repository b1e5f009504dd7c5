"""Several processes on one machine merge as one does."""

from __future__ import annotations

import json
import os
import pathlib
import re
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import mergekit_jax as mk
from mergekit_jax import sharding
from mergekit_jax.checkpoint.stage import staged
from tests import checkpoints, compare
from tests.launch import report_of, run_merge
from tests.test_memory import MIB, RUNTIME, save
from tests.test_resume import assert_same, job, restored, sources

__all__ = ['sources']  # a fixture

METHODS = {
  'elementwise': ('mk.task_arithmetic(scale=0.3)', 2),
  'threshold-model': ("mk.ties(density=0.3, scale=0.8, scope='model')", 4),
  'threshold-tensor': ("mk.ties(density=0.3, scale=0.8, scope='tensor')", 2),
  'random': ('mk.dare(drop_rate=0.4, scale=0.8)', 2),
}


@pytest.mark.parametrize('family', list(METHODS))
def test_same_bits(family, sources, tmp_path):
  method, processes = METHODS[family]
  arguments = job(sources, tmp_path / 'out', 'threshold')
  run_merge({**arguments, 'method': method}, processes=processes)
  arguments |= {'method': eval(method), 'output': tmp_path / 'one'}
  mk.merge_checkpoints(**arguments)
  expected = restored(tmp_path / 'one')
  assert_same(tmp_path / 'out', expected)
  written = json.loads((tmp_path / 'out.report.json').read_text())
  for path, parts in written['checksums'].items():
    leaf = expected['params'][path.removeprefix('params/')]
    sizes = [np.prod(shape) for _, shape, _ in parts]
    assert sum(sizes) == leaf.size, f'{path} written more or less than once'


def test_each_process_reads_its_share(sources, tmp_path):
  """Leaves of 1 MB and more, read once: at most 55 % each of 2 processes."""
  arguments = job(sources, tmp_path / 'out', 'threshold')
  arguments |= {'method': METHODS['elementwise'][0], 'memory_budget': '64MiB'}
  _, printed = run_merge(arguments, processes=2)
  size = sum(
    leaf.nbytes
    for name in ('base', 'one', 'two')
    for leaf in restored(sources / name)['params'].values()
    if leaf.nbytes >= 10**6
  )
  for text in printed:
    assert 0.45 * size < report_of(text)['read'] <= 0.55 * size


def test_sums_are_shared_by_programs_compiled_once(
  sources, tmp_path, monkeypatch
):
  """However many boxes and rounds, where the layers lie over the processes."""
  monkeypatch.setenv('JAX_LOG_COMPILES', '1')
  arguments = job(sources, tmp_path / 'out', 'threshold')
  arguments['method'] = METHODS['threshold-tensor'][0]
  arguments['partition_rules'] = {'.*/layers': ['fsdp']}
  _, printed = run_merge(arguments, processes=2, devices=1)
  for text in printed:
    assert report_of(text)['done'] > 5
    lines = re.findall(r'Compiling jit\(replicate\).*', text)
    assert lines and len(lines) == len(set(lines)), lines
  del arguments['partition_rules']
  arguments |= {'method': eval(arguments['method'])}
  mk.merge_checkpoints(**{**arguments, 'output': tmp_path / 'one'})
  assert_same(tmp_path / 'out', restored(tmp_path / 'one'))


def test_sums_that_all_processes_have_are_not_shared(
  sources, tmp_path, monkeypatch
):
  monkeypatch.setenv('JAX_LOG_COMPILES', '1')
  arguments = job(sources, tmp_path / 'out', 'threshold')
  _, printed = run_merge(arguments, processes=2)
  for text in printed:
    assert 'Compiling jit(merge)' in text and 'jit(replicate)' not in text


def test_memory_of_each_process(tmp_path):
  """Each of two processes merges its half of five models of 64 MB.

  That is 160 MB, in float32 320 MB, with a budget of 32 MiB. What a first merge
  of a tiny model takes is subtracted; 49 and 50 MiB more were measured.
  """
  shapes = {'tiny': (256, 64), 'large': (4096, 2048)}
  base, expert = {}, {}
  for name, shape in shapes.items():
    leaves = dict.fromkeys('abcd', shape)
    base[name] = str(save(tmp_path / f'{name}0', leaves, 0))
    expert[name] = str(save(tmp_path / f'{name}1', leaves, 1))
  budget = 32 * MIB
  arguments = {
    name: {
      'base': base[name],
      'experts': [expert[name]] * 4,
      'output': str(tmp_path / f'{name}_out'),
    }
    for name in shapes
  }
  job = {**arguments['large'], 'first': [arguments['tiny']]}
  job |= {'method': 'mk.ties()', 'memory_budget': budget}
  _, printed = run_merge(job, processes=2, devices=1)
  for text in printed:
    tiny, large = report_of(text)['peaks']
    assert large - tiny < budget + RUNTIME, (tiny / MIB, large / MIB)


def test_safetensors_output(sources, tmp_path):
  """Two processes write into one file."""
  arguments = job(sources, tmp_path / 'out', 'random', format='safetensors')
  run_merge(arguments, processes=2)
  arguments |= {'method': eval(arguments['method'])}
  mk.merge_checkpoints(**{**arguments, 'output': tmp_path / 'one'})
  files = [tmp_path / name / 'model.safetensors' for name in ('out', 'one')]
  compare.same_bits(*map(load_file, files))


@pytest.mark.parametrize(
  ('value', 'place', 'scale', 'said'),
  [
    (np.nan, (0, 0, 0), 1, 'holds 1 non-finite values .* on process 0'),
    (np.inf, (0, -1, -1), 1, 'holds 1 non-finite values .* on process 1'),
    (1e30, (0, -1, -1), 1e9, 'gave 1 non-finite values .* on process 1'),
    (1e30, (0, -1, -1), 1, None),
  ],
  ids=['first', 'second', 'merge', 'finite'],
)
def test_all_find_what_one_holds(value, place, scale, said, sources, tmp_path):
  """Squares that overflow show in the sums too, and are no fault."""
  model = restored(sources / 'two')
  layers = np.array(model['params']['layers'])
  layers[place] = value
  model['params']['layers'] = layers
  expert = checkpoints.save(tmp_path / 'expert', model)
  arguments = job(sources, tmp_path / 'out', 'random')
  arguments['experts'] = [str(expert)]
  arguments['method'] = f'mk.task_arithmetic({scale})'
  codes, printed = run_merge(arguments, processes=2, check=False)
  assert codes == ([1, 1] if said else [0, 0]), printed
  error = rf'\nFloatingPointError: .*params/layers.* {said}'
  for text in printed:
    assert bool(re.search(error, text)) is (said is not None)
  assert (tmp_path / 'out').exists() is (said is None)


def test_all_say_what_the_first_was_refused(sources, tmp_path):
  """Only the first process holds the lock; the others hear why it cannot."""
  output = tmp_path / 'out'
  arguments = job(sources, output, 'random')
  with pytest.raises(RuntimeError, match='stop'):
    with staged(output, {}, overwrite=False, resume=True):
      codes, printed = run_merge(arguments, processes=2, check=False)
      raise RuntimeError('stop')
  assert codes == [1, 1]
  said = f'Another merge (process {os.getpid()} on'
  assert f'\nValueError: {said}' in printed[0]
  heard = 'OSError: Process 0 failed, so all processes end. It said: ValueError'
  assert f'\n{heard}: {said}' in printed[1]


@pytest.mark.parametrize(
  ('name', 'values', 'said'),
  [
    (
      'method',
      ['mk.task_arithmetic(0.3)', 'mk.task_arithmetic(0.30000000000000004)'],
      'method, numbers of the method',
    ),
    ('seed', [0, 1], 'seed'),
    ('allow_nonfinite', [True, False], 'allow_nonfinite'),
    (
      'memory_budget',
      ['8MiB', '4GiB'],
      'mesh, memory_budget, partition_rules, stacked_axes or versions',
    ),
    (
      'stacked_axes',
      [{'params/layers': 0}, None],
      'mesh, memory_budget, partition_rules, stacked_axes or versions',
    ),
  ],
)
def test_processes_that_were_told_different_things(
  name, values, said, sources, tmp_path
):
  """They would each write a part of another merge, or wait forever."""
  arguments = {**job(sources, tmp_path / 'out', 'threshold'), 'apart': [name]}
  codes, printed = run_merge(
    {**arguments, name: values}, processes=2, check=False
  )
  assert codes == [1, 1], printed
  differ = f'Process 1 and process 0 differ in {said}. Give all'
  heard = 'OSError: Process 1 failed, so all processes end. It said: ValueError'
  assert f'\nValueError: {differ}' in printed[1]
  assert f'\n{heard}: {differ}' in printed[0]
  assert not (tmp_path / 'out').exists()


def test_a_step_that_only_one_process_has_found(sources, tmp_path):
  """A directory of steps means the newest, which may just have been saved."""
  model = restored(sources / 'one')
  for newest in (1, 2):
    with ocp.CheckpointManager(tmp_path / f'to_{newest}') as manager:
      for step in range(1, newest + 1):
        manager.save(step, args=ocp.args.StandardSave(model))
  arguments = job(sources, tmp_path / 'out', 'random')
  experts = [[str(tmp_path / f'to_{newest}')] for newest in (1, 2)]
  codes, printed = run_merge(
    {**arguments, 'experts': experts, 'apart': ['experts']},
    processes=2,
    check=False,
  )
  assert codes == [1, 1], printed
  assert 'Process 1 and process 0 differ in experts[0]. Give' in printed[1]


@pytest.mark.parametrize('option', ['overwrite', 'resume'])
def test_processes_that_would_end_in_different_ways(option, sources, tmp_path):
  """One goes on, where the other refuses what is there and leaves it alone."""
  arguments = job(sources, tmp_path / 'out', 'random')
  run_merge(arguments)
  codes, printed = run_merge(
    {**arguments, option: [True, False], 'apart': [option]},
    processes=2,
    check=False,
  )
  assert codes == [1, 1], printed
  assert f'Process 1 and process 0 differ in {option}. Give' in printed[1]


def test_processes_with_different_numbers_of_devices(monkeypatch):
  mesh = sharding.make_mesh()
  device = lambda process: types.SimpleNamespace(process_index=process)
  found = [device(0), device(0), device(1)]
  monkeypatch.setattr(jax, 'devices', lambda: found)
  with pytest.raises(ValueError, match='have 2, 1 devices; start each with'):
    sharding.demand_all_processes(mesh)


@pytest.mark.parametrize('changed', [0, 1])
def test_a_source_that_changes_for_one_process(changed, sources, tmp_path):
  """Each looks at what it has read, which may be a copy of its own."""
  arguments = job(sources, tmp_path / 'out', 'random')
  codes, printed = run_merge(
    {**arguments, 'touched': changed}, processes=2, check=False
  )
  assert codes == [1, 1], printed
  assert all('changed while it was read' in each for each in printed)
  assert not (tmp_path / 'out').exists()
  run_merge(arguments, processes=2)


def test_a_mesh_without_one_of_the_processes(sources, tmp_path):
  arguments = job(sources, tmp_path / 'out', 'random')
  command = ['merge', '--method=average', '--mesh=fsdp=1', '--output']
  command += [arguments['output'], '--experts', *arguments['experts']]
  codes, printed = run_merge(
    {'command': command}, processes=2, devices=1, check=False
  )
  assert codes == [1, 1]
  for text in printed:
    assert (
      "mergekit-jax: The mesh {'fsdp': 1} has no device of process 1" in text
    )


@pytest.mark.parametrize(
  ('victim', 'method'), [(0, 'random'), (1, 'threshold')]
)
def test_a_killed_peer_stops_the_others(victim, method, sources, tmp_path):
  """They end with a message within 30 s, which `run_merge` sees to."""
  arguments = job(sources, tmp_path / 'out', method)
  codes, printed = run_merge(
    {**arguments, 'kill': [victim, 3]}, processes=2, check=False
  )
  # Ended by themselves, not by the launcher.
  assert codes[victim] == -9 and codes[1 - victim] not in (0, -9)
  assert re.search('unhealthy|coordination service|closed', printed[1 - victim])
  assert not pathlib.Path(arguments['output']).exists()
  _, printed = run_merge(arguments, processes=2)
  assert report_of(printed[0])['resumed'] > 0
  arguments |= {'method': eval(arguments['method'])}
  mk.merge_checkpoints(**{**arguments, 'output': tmp_path / 'one'})
  assert_same(tmp_path / 'out', restored(tmp_path / 'one'))


@pytest.mark.parametrize('failing', [0, 1])
def test_a_read_error_on_one_host_ends_all(failing, sources, tmp_path):
  """Without a timeout of the command line they wait for five minutes."""
  output = tmp_path / 'out'
  command = ['merge', '--method=ties', '--set=scope=model', '--devices=2']
  command += ['--stacked_axes=params/layers=0', '--memory_budget=8MiB']
  command += ['--base', str(sources / 'base'), '--output', str(output)]
  command += ['--experts', str(sources / 'one'), str(sources / 'two')]
  codes, printed = run_merge(
    # In the last of three reads, of 168 pieces each.
    {'command': command, 'unreadable': [failing, 480]},
    processes=2,
    check=False,
  )
  # Ended by themselves, not by the launcher.
  assert all(code not in (0, -9) for code in codes)
  error = r'^mergekit-jax: .*params/\w+ in .* could not be read \(no way to the'
  assert re.search(error, printed[failing], re.MULTILINE)
  assert 'another task died' in printed[1 - failing]
  assert not output.exists()
  run_merge({'command': command}, processes=2)
  assert checkpoints.report_of(output)['units_resumed'] > 0
