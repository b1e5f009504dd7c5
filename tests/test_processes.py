"""Several processes on one machine merge as one does."""

from __future__ import annotations

import concurrent.futures
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
from mergekit_jax.command import joining
from tests import checkpoints, compare
from tests.launch import report_of, run_merge, SECONDS_TO_END
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
def test_same_bits(family, sources, tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_LOG_COMPILES', '1')
  method, processes = METHODS[family]
  arguments = job(sources, tmp_path / 'out', 'threshold')
  _, printed = run_merge({**arguments, 'method': method}, processes=processes)
  # Sums that all processes have are not shared.
  for text in printed:
    assert 'Compiling jit(merge)' in text and 'jit(replicate)' not in text
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
  arguments['method'] = METHODS['elementwise'][0]
  run_merge(arguments, processes=2)
  arguments |= {'method': eval(arguments['method'])}
  mk.merge_checkpoints(**{**arguments, 'output': tmp_path / 'one'})
  files = [tmp_path / name / 'model.safetensors' for name in ('out', 'one')]
  compare.same_bits(*map(load_file, files))


def test_all_find_what_one_holds(sources, tmp_path):
  """Squares that overflow show in the sums too, and are no fault."""
  model = restored(sources / 'two')

  def changes(name, value, place, scale):
    layers = np.array(model['params']['layers'])
    layers[place] = value
    params = {**model['params'], 'layers': layers}
    path = checkpoints.save(tmp_path / name, {**model, 'params': params})
    return {
      'experts': [str(path)],
      'method': f'mk.task_arithmetic({scale})',
      'output': str(tmp_path / f'{name}_out'),
    }

  arguments = job(sources, tmp_path / 'out', 'random')
  arguments['refused'] = [
    changes('first', np.nan, (0, 0, 0), 1),
    changes('second', np.inf, (0, -1, -1), 1),
    changes('merge', 1e30, (0, -1, -1), 1e9),
  ]
  arguments |= changes('finite', 1e30, (0, -1, -1), 1)
  _, printed = run_merge(arguments, processes=2)
  said = (
    'holds 1 non-finite values .* on process 0',
    'holds 1 non-finite values .* on process 1',
    'gave 1 non-finite values .* on process 1',
  )
  for text in printed:
    errors = re.findall('\nFloatingPointError: .*', text)
    for error, expected in zip(errors, said, strict=True):
      assert re.search(f'params/layers.* {expected}', error)
  outputs = {path.name for path in tmp_path.glob('*_out')}
  assert outputs == {'finite_out'}


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


def test_processes_that_were_told_different_things(sources, tmp_path):
  """They would each write a part of another merge, or wait forever."""
  plan = 'mesh, memory_budget, partition_rules, stacked_axes or versions'
  methods = [
    f'mk.task_arithmetic({scale})' for scale in (0.3, 0.30000000000000004)
  ]
  # A directory of steps means the newest, which may just have been saved.
  model = restored(sources / 'one')
  for newest in (1, 2):
    with ocp.CheckpointManager(tmp_path / f'to_{newest}') as manager:
      for step in range(1, newest + 1):
        manager.save(step, args=ocp.args.StandardSave(model))
  steps = [[str(tmp_path / f'to_{newest}')] for newest in (1, 2)]
  # One goes on, where the other refuses what is there and leaves it alone.
  arguments = job(sources, tmp_path / 'there', 'random')
  mk.merge_checkpoints(**{**arguments, 'method': mk.average()})
  there = {'output': arguments['output']}
  differing = {
    'method': (methods, 'method, numbers of the method'),
    'allow_nonfinite': ([True, False], 'allow_nonfinite'),
    'memory_budget': (['8MiB', '4GiB'], plan),
    'stacked_axes': ([{'params/layers': 0}, None], plan),
    'experts': (steps, 'experts[0]'),
    'overwrite': ([True, False], 'overwrite'),
    'resume': ([True, False], 'resume'),
    'seed': ([0, 1], 'seed'),
  }
  more = {'overwrite': {**there, 'resume': True}, 'resume': there}
  differ_in = lambda name: {
    name: differing[name][0],
    'apart': [name],
    **more.get(name, {}),
  }
  arguments = job(sources, tmp_path / 'out', 'threshold')
  *others, last = differing
  refused = [{last: arguments[last], **differ_in(name)} for name in others]
  codes, printed = run_merge(
    {**arguments, 'refused': refused, **differ_in(last)},
    processes=2,
    check=False,
  )
  assert codes == [1, 1], printed
  differ = [
    f'ValueError: Process 1 and process 0 differ in {said}. Give all'
    for _, said in differing.values()
  ]
  heard = 'OSError: Process 1 failed, so all processes end. It said:'
  for text, expected in (
    (printed[1], differ),
    (printed[0], [f'{heard} {error}' for error in differ]),
  ):
    errors = re.findall(r'\n((?:OSError|ValueError): .* Give all)', text)
    assert errors == expected
  assert not (tmp_path / 'out').exists()


def test_processes_with_different_numbers_of_devices(monkeypatch):
  mesh = sharding.make_mesh()
  device = lambda process: types.SimpleNamespace(process_index=process)
  found = [device(0), device(0), device(1)]
  monkeypatch.setattr(jax, 'devices', lambda: found)
  with pytest.raises(ValueError, match='have 2, 1 devices; start each with'):
    sharding.demand_all_processes(mesh)


def test_a_source_that_changes_for_one_process(sources, tmp_path):
  """Each looks at what it has read, which may be a copy of its own."""
  arguments = job(sources, tmp_path / 'out', 'random')
  arguments['method'] = METHODS['elementwise'][0]
  first, second = (
    {'output': str(tmp_path / f'out{process}')} for process in range(2)
  )
  arguments |= {
    'refused': [{**first, 'touched': 0}, {**second, 'touched': 1}],
    # An output that was there already would be refused.
    'first': [first],
    **second,
  }
  _, printed = run_merge(arguments, processes=2)
  for text in printed:
    assert text.count('changed while it was read') == 2


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


def at_once(check, cases):
  """Most of the time of these is waited, so they wait together."""
  with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
    for checked in [pool.submit(check, *case) for case in cases]:
      checked.result()


def test_a_killed_peer_stops_the_others(sources, tmp_path):
  """They end with a message within 30 s, which `run_merge` sees to."""
  cases = [(0, 'random'), (1, 'threshold-model')]

  def told(output, method):
    arguments = job(sources, tmp_path / output, 'threshold')
    # Programs of these are compiled for `test_same_bits` too.
    return arguments | {'method': METHODS[method][0]}

  def check(victim, method):
    arguments = told(method, method)
    codes, printed = run_merge(
      {**arguments, 'kill': [victim, 3]}, processes=2, check=False
    )
    # Ended by themselves, not by the launcher.
    assert codes[victim] == -9 and codes[1 - victim] not in (0, -9)
    said = 'unhealthy|coordination service|closed'
    assert re.search(said, printed[1 - victim])
    assert not pathlib.Path(arguments['output']).exists()
    _, printed = run_merge(arguments, processes=2)
    assert report_of(printed[0])['resumed'] > 0

  at_once(check, cases)
  for _, method in cases:
    arguments = told(f'{method}_one', method)
    mk.merge_checkpoints(**arguments | {'method': eval(arguments['method'])})
    assert_same(tmp_path / method, restored(tmp_path / f'{method}_one'))


def test_a_read_error_on_one_host_ends_all(sources, tmp_path):
  """Without a timeout of the command line they wait for five minutes.

  It is waited for once it is reached, so these wait for less.
  """
  assert joining._SHUTDOWN_TIMEOUT_SECONDS < SECONDS_TO_END
  failed = {'shutdown_timeout': 5}

  def check(failing):
    output = tmp_path / f'out{failing}'
    command = ['merge', '--method=ties', '--set=scope=model', '--devices=2']
    command += ['--stacked_axes=params/layers=0', '--memory_budget=8MiB']
    command += ['--base', str(sources / 'base'), '--output', str(output)]
    command += ['--experts', str(sources / 'one'), str(sources / 'two')]
    codes, printed = run_merge(
      # In the last of three reads, of 168 pieces each.
      {'command': command, 'unreadable': [failing, 480], **failed},
      processes=2,
      check=False,
    )
    # Ended by themselves, not by the launcher.
    assert all(code not in (0, -9) for code in codes)
    error = (
      r'^mergekit-jax: .*params/\w+ in .* could not be read \(no way to the'
    )
    assert re.search(error, printed[failing], re.MULTILINE)
    assert 'another task died' in printed[1 - failing]
    assert not output.exists()
    run_merge({'command': command}, processes=2)
    assert checkpoints.report_of(output)['units_resumed'] > 0

  at_once(check, [(0,), (1,)])
