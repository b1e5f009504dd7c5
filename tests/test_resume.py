"""Killed merges, started again."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import itertools
import os
import pathlib
import random
import re
import resource
import shutil
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1
import pytest

import mergekit_jax as mk
from mergekit_jax import verify
from mergekit_jax.checkpoint import (
  journal,
  locks,
  orbax_write,
  recorded,
  replace,
)
from mergekit_jax.checkpoint import stage as stages
from mergekit_jax.checkpoint.stage import Stage
from mergekit_jax.jobs import job as jobs
from mergekit_jax.report import MergeReport
from tests import checkpoints, compare
from tests.launch import report_of, run_merge

METHODS = {
  'threshold': "mk.ties(density=0.3, scale=0.8, scope='model')",
  'random': 'mk.dare_ties(drop_rate=0.4, scale=0.8)',
}
STACKED = {r'params/layers': 0}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """A base and two experts, saved by 8 devices, as chunks of an eighth.

  A small budget cuts them into many boxes.
  """
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
  columns = lambda leaf: NamedSharding(
    mesh, P(*[None] * (leaf.ndim - 1), 'fsdp') if leaf.ndim > 1 else P()
  )
  folder = tmp_path_factory.mktemp('sources')
  generator = np.random.default_rng(0)
  shapes = {'layers': (6, 128, 512), 'embedding': (1030, 256), 'norm': (77,)}
  handler = ocp.PyTreeCheckpointHandler(use_compression=False)
  with ocp.Checkpointer(handler) as checkpointer:
    base = {k: generator.standard_normal(s) for k, s in shapes.items()}
    for name in ('base', 'one', 'two'):
      tree = {
        k: jnp.float32(v + 0.1 * generator.standard_normal(v.shape))
        for k, v in base.items()
      }
      tree = {k: jax.device_put(v, columns(v)) for k, v in tree.items()}
      tree['count'] = jnp.int32(7)
      checkpointer.save(
        folder / name, args=ocp.args.PyTreeSave({'params': tree, 'step': 3})
      )
  return folder


def job(sources, output, method, **more):
  return {
    'method': METHODS[method],
    'base': str(sources / 'base'),
    'experts': [str(sources / 'one'), str(sources / 'two')],
    'output': str(output),
    'memory_budget': '8MiB',
    'stacked_axes': STACKED,
    'seed': 3,
    **more,
  }


def restored(path):
  """By ordinary Orbax, which wants a target on another topology."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  specs = mk.open_checkpoint(path).specs
  target = {
    name.removeprefix('params/'): jax.ShapeDtypeStruct(
      spec.shape, spec.dtype, sharding=here
    )
    for name, spec in specs.items()
    if name.startswith('params/')
  }
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(
      path,
      {'params': target}
      if len(specs) == len(target)
      else {'params': target, 'step': 0},
    )


def assert_same(path, expected):
  jax.tree.map(np.testing.assert_array_equal, restored(path), expected)


@pytest.fixture(scope='module', params=list(METHODS))
def undisturbed(request, sources, tmp_path_factory):
  output = tmp_path_factory.mktemp('undisturbed') / 'out'
  _, (printed,) = run_merge(job(sources, output, request.param))
  report = report_of(printed)
  assert report['resumed'] == 0
  return request.param, report['done'], restored(output)


def test_killed_and_resumed(undisturbed, sources, tmp_path):
  """Twice killed at random units, then finished: bit for bit the same."""
  method, units, expected = undisturbed
  output = tmp_path / 'out'
  first, second = sorted(random.sample(range(1, units), 2))
  print(f'killed after {first} and {second} of {units} units')
  written = 0
  for count in (first, second - first):
    codes, _ = run_merge(
      job(sources, output, method, kill=[0, count]), check=False
    )
    assert codes == [-9] and not output.exists()
    written += count
    journal = (tmp_path / 'out.mergekit-tmp/journal.0.jsonl').read_text()
    assert len(journal.splitlines()) == written
  _, (printed,) = run_merge(job(sources, output, method))
  report = report_of(printed)
  assert (report['done'], report['resumed']) == (units - written, written)
  assert 'which is gone' in printed
  assert_same(output, expected)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['out', 'out.report.json']


def merge(sources, output, **changes):
  arguments = job(sources, output, 'threshold')
  arguments |= {'method': mk.average(), 'memory_budget': '1GiB'}
  arguments |= {'output': output} | changes
  return mk.merge_checkpoints(**arguments)


@pytest.fixture(scope='module')
def killed(sources, tmp_path_factory):
  """Where a merge into `out` was killed after three units."""
  folder = tmp_path_factory.mktemp('killed')
  arguments = job(sources, folder / 'out', 'threshold', kill=[0, 3])
  arguments |= {'method': 'mk.average()', 'memory_budget': '1GiB'}
  codes, printed = run_merge(arguments, devices=8, check=False)
  assert codes == [-9], printed
  return folder


def leave_unfinished(killed, output):
  shutil.copytree(killed, output.parent, dirs_exist_ok=True)


@pytest.mark.parametrize('look', [mk.open_checkpoint, verify.verify])
def test_what_is_unfinished_is_named(killed, look):
  stage = killed / 'out.mergekit-tmp'
  with pytest.raises(FileNotFoundError, match=f'merge lies in {stage}'):
    look(killed / 'out')


def test_another_plan_is_refused(sources, killed, tmp_path):
  output = tmp_path / 'out'
  leave_unfinished(killed, output)
  with pytest.raises(ValueError, match='seed: 3 then, 4 now'):
    merge(sources, output, seed=4)
  with pytest.raises(ValueError, match='memory_budget: 1073741824 then, 10'):
    merge(sources, output, memory_budget='1GB')
  with pytest.raises(ValueError, match='compression: null then, "zstd" now'):
    merge(sources, output, compression='zstd')
  with pytest.raises(ValueError, match='zarr3: null then, true now'):
    merge(sources, output, zarr3=True)
  with pytest.raises(ValueError, match='unfinished merge that differs'):
    merge(sources, output, experts=[str(sources / 'one')])
  said = r'stacked_axes: {"params/layers": \[0\]} then, .*\[1\]} now'
  with pytest.raises(ValueError, match=said):
    merge(sources, output, stacked_axes={'.*/layers': 1})
  with pytest.raises(ValueError, match='dtype: null then, "float32" now'):
    merge(sources, output, dtype='float32')
  report = merge(sources, output, seed=4, resume=False)
  assert report.units_resumed == 0 and output.exists()


@pytest.fixture
def copied(sources, tmp_path):
  """A copy of an expert, to be damaged, and its largest data file."""
  copy = tmp_path / 'copied'
  shutil.copytree(sources / 'two', copy)
  files = [file for file in copy.rglob('*') if file.is_file()]
  return copy, max(files, key=lambda file: file.stat().st_size)


@pytest.mark.parametrize('fault', ['removed', 'cut off'])
def test_a_read_error_is_made_good(
  fault, sources, copied, tmp_path, monkeypatch
):
  """A source is damaged in the middle of a merge, put back, and finished."""
  copy, data = copied
  output = tmp_path / 'out'
  changes = {'method': eval(METHODS['threshold']), 'memory_budget': '8MiB'}
  experts = [str(sources / 'one'), str(copy)]
  content, found = data.read_bytes(), data.stat()
  record = Stage.record
  recorded = []

  def record_and_damage(stage, unit, facts):
    record(stage, unit, facts)
    recorded.append(unit)
    if len(recorded) == 4:
      # A new file: cutting off what is mapped would end the process.
      data.unlink()
      if fault == 'cut off':
        data.write_bytes(content[:1000])

  monkeypatch.setattr(Stage, 'record', record_and_damage)
  with pytest.raises(OSError) as caught:
    merge(sources, output, experts=experts, **changes)
  monkeypatch.undo()
  said = re.escape(f' in {copy} could not be read')
  assert re.match(rf'experts\[1\]: params/\w+{said}', str(caught.value))
  assert not output.exists()

  data.write_bytes(content)
  os.utime(data, ns=(found.st_atime_ns, found.st_mtime_ns))
  report = merge(sources, output, experts=experts, **changes)
  assert report.units_resumed == len(recorded) >= 4
  merge(sources, tmp_path / 'undisturbed', **changes)
  assert_same(output, restored(tmp_path / 'undisturbed'))


def test_another_number_of_processes_is_refused(sources, tmp_path):
  arguments = job(sources, tmp_path / 'out', 'threshold')
  arguments |= {'method': 'mk.average()', 'memory_budget': '1GiB'}
  run_merge({**arguments, 'kill': [0, 2]}, devices=2, check=False)
  codes, printed = run_merge(arguments, processes=2, devices=1, check=False)
  assert all('processes: 1 then, 2 now' in text for text in printed)
  assert codes == [1, 1] and not (tmp_path / 'out').exists()
  _, (printed,) = run_merge(arguments, devices=2)
  assert report_of(printed)['resumed'] == 2


def test_a_source_that_changed_is_refused(sources, copied, tmp_path):
  copy, data = copied
  output = tmp_path / 'out'
  arguments = job(sources, output, 'threshold', kill=[0, 3])
  experts = [str(sources / 'one'), str(copy)]
  arguments |= {'method': 'mk.average()', 'memory_budget': '1GiB'}
  arguments |= {'experts': experts}
  codes, printed = run_merge(arguments, devices=8, check=False)
  assert codes == [-9], printed
  os.utime(data, ns=(1, 1))
  said = r'differs:\n  source experts\[1\]\n'  # and no digest of it
  with pytest.raises(ValueError, match=said) as caught:
    merge(sources, output, experts=experts)
  what_to_do = str(caught.value).splitlines()[-1]
  assert 'has changed since' in what_to_do
  assert 'resume=False (--noresume) throws away' in what_to_do
  # With these nobody can finish it.
  assert 'same arguments' not in what_to_do
  merge(sources, output, experts=experts, resume=False)


def test_a_source_may_be_spelt_differently(
  sources, killed, tmp_path, monkeypatch
):
  output = tmp_path / 'out'
  leave_unfinished(killed, output)
  monkeypatch.chdir(sources)
  report = merge(sources, output, base='base', experts=['./one', 'two'])
  assert report.units_resumed == 3


@mk.rule
class Mapped:
  function: Any = dataclasses.field(metadata={'static': True})

  def __call__(self, t):
    return self.function(t.experts[0])


def test_a_rule_that_holds_a_function_is_gone_on_with(
  sources, tmp_path, monkeypatch, caplog
):
  """Its address is another one in every process."""
  record = Stage.record

  def once(stage, *arguments):
    record(stage, *arguments)
    raise RuntimeError('stop')

  first, second = Mapped(lambda x: x / 2), Mapped(lambda x: x / 2)
  with monkeypatch.context() as patch:
    patch.setattr(Stage, 'record', once)
    with (
      caplog.at_level('WARNING', logger='absl'),
      pytest.raises(RuntimeError, match='stop'),
    ):
      merge(sources, tmp_path / 'out', method=first)
  assert 'another one into this output needs resume=False' in caplog.text
  report = merge(sources, tmp_path / 'out', method=second)
  assert report.units_resumed >= 1
  assert 'function=<function' in report.provenance['method']


def test_two_merges_into_one_output(sources, tmp_path):
  output = tmp_path / 'out'
  with pytest.raises(RuntimeError, match='stop'):
    with stages.staged(output, {}, overwrite=False, resume=True):
      with pytest.raises(ValueError, match=r'Another merge \(process \d+ on'):
        merge(sources, output)
      raise RuntimeError('stop')
  assert merge(sources, output).units_resumed == 0


def test_a_disk_without_locks(sources, tmp_path, monkeypatch):
  """Nobody else is writing there, and waiting would not help."""

  def no_locks(*arguments):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  with pytest.raises(OSError, match='cannot be locked: .*No locks available'):
    merge(sources, tmp_path / 'out')


def test_a_lock_that_its_owner_has_removed_is_none(tmp_path, monkeypatch):
  """The owner was done between our opening the file and locking it."""
  directory = tmp_path / 'out.mergekit-tmp'
  flock = fcntl.flock

  def too_late(*arguments):
    monkeypatch.undo()
    shutil.rmtree(directory)
    flock(*arguments)

  monkeypatch.setattr(fcntl, 'flock', too_late)
  with locks.file_locked(directory):
    with pytest.raises(ValueError, match='Another merge'):
      with locks.file_locked(directory):
        pass
  with locks.file_locked(directory):
    pass


@pytest.mark.parametrize('overwrite', [False, True])
def test_what_appears_at_the_output_meanwhile(
  overwrite, sources, tmp_path, monkeypatch
):
  """Is left alone; once it is moved away, the merge is finished."""
  output = tmp_path / 'out'
  records = Stage.records

  def records_and_more(stage):
    output.mkdir()
    (output / 'thesis.tex').write_text('years of work')
    (tmp_path / 'out.report.json').write_text('of it')
    return records(stage)

  with monkeypatch.context() as patch:
    patch.setattr(Stage, 'records', records_and_more)
    with pytest.raises(FileExistsError) as caught:
      merge(sources, output, overwrite=overwrite)
  said = (
    f'{output} has appeared since .* complete in {output}.mergekit-tmp: move'
  )
  assert re.match(said, str(caught.value))
  assert (output / 'thesis.tex').read_text() == 'years of work'
  assert (tmp_path / 'out.report.json').read_text() == 'of it'
  output.rename(tmp_path / 'thesis')
  with pytest.raises(FileExistsError, match='not the report of a merge'):
    merge(sources, output, overwrite=overwrite)
  (tmp_path / 'out.report.json').rename(tmp_path / 'thesis.report.json')
  report = merge(sources, output, overwrite=overwrite)
  assert report.units_resumed and not report.units_done
  merge(sources, tmp_path / 'undisturbed')
  assert_same(output, restored(tmp_path / 'undisturbed'))


def test_what_appears_before_the_lock_is_taken(sources, tmp_path, monkeypatch):
  output = tmp_path / 'out'
  locked = locks.file_locked

  def too_late(directory):
    output.mkdir()
    (output / 'thesis.tex').touch()
    return locked(directory)

  monkeypatch.setattr(locks, 'file_locked', too_late)
  monkeypatch.setattr(Stage, 'record', pytest.fail)
  with pytest.raises(FileExistsError, match='out exists. Give another path'):
    merge(sources, output)
  assert output.exists()


def facts(output):
  """What a report says of the output, however often it was begun."""
  report = checkpoints.report_of(output)
  return report['tensors'], {
    path: sorted(parts) for path, parts in report['checksums'].items()
  }


def interrupted(patch, name, call=1, error=KeyboardInterrupt):
  """Ends a merge as a method of its stage is called for the nth time."""
  method, left = getattr(Stage, name), [call]

  def interrupt(stage, *arguments):
    left[0] -= 1
    if not left[0]:
      raise error
    return method(stage, *arguments)

  patch.setattr(Stage, name, interrupt)


def test_a_line_of_the_journal_that_was_cut_off(sources, tmp_path, monkeypatch):
  """Costs its own unit, not the next one too, nor the report a tensor."""
  output = tmp_path / 'out'
  with monkeypatch.context() as patch:
    interrupted(patch, 'record', 4)
    with pytest.raises(KeyboardInterrupt):
      merge(sources, output)
  lines = tmp_path / 'out.mergekit-tmp/journal.0.jsonl'
  os.truncate(lines, lines.stat().st_size - 9)
  assert merge(sources, output).units_resumed == 2
  merge(sources, tmp_path / 'undisturbed')
  assert facts(output) == facts(tmp_path / 'undisturbed')
  assert not verify.verify(output)


def test_a_record_that_is_lost(sources, tmp_path, monkeypatch):
  """Nothing is published without it, and it can be made good for."""
  output = tmp_path / 'out'
  add = journal.Writer.add

  def lose_one(writer, unit, facts):
    if unit != 1:
      add(writer, unit, facts)

  with monkeypatch.context() as patch:
    patch.setattr(journal.Writer, 'add', lose_one)
    with pytest.raises(OSError, match='1 of 4 units .* Start the same merge'):
      merge(sources, output)
  assert not output.exists()
  assert merge(sources, output).units_done == 1
  merge(sources, tmp_path / 'undisturbed')
  assert facts(output) == facts(tmp_path / 'undisturbed')


def save_as_manager(path, tree):
  with ocp.CheckpointManager(path, item_names=('items',)) as manager:
    manager.save(7, args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))


def save(path, tree, **options):
  handler = ocp.PyTreeCheckpointHandler(**options)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


LAYOUTS = {
  'zarr2': functools.partial(save, use_ocdbt=False),
  'zarr3': functools.partial(save, use_ocdbt=False, use_zarr3=True),
  'flat': checkpoints.save,
  'item': v1.save,
  'step': save_as_manager,
  'safetensors': checkpoints.save_safetensors,
}


@pytest.fixture(params=LAYOUTS)
def laid_out(request, tmp_path):
  """A merge of one model that lies as a layout has it."""
  source = tmp_path / 'source.safetensors'
  arrays = {n: jnp.arange(512.0) + ord(n) for n in 'abcd'}
  LAYOUTS[request.param](source, {'params': arrays})
  return lambda output, **options: mk.merge_checkpoints(
    mk.average(), experts=[source], output=output, **options
  )


def assert_finished(laid_out, output):
  laid_out(output.parent / 'undisturbed')
  assert facts(output) == facts(output.parent / 'undisturbed')
  assert not verify.verify(output)
  found, expected = map(
    mk.open_checkpoint, (output, output.parent / 'undisturbed')
  )
  assert found.layout == expected.layout and len(found.specs) == 4
  names = {path.name for path in output.parent.iterdir()}
  assert names == {
    *('source.safetensors', 'out', 'out.report.json'),
    *('undisturbed', 'undisturbed.report.json'),
  }


def test_interrupted_in_every_layout(laid_out, tmp_path):
  output = tmp_path / 'out'
  with pytest.MonkeyPatch.context() as patch:
    interrupted(patch, 'record', 3)
    with pytest.raises(KeyboardInterrupt):
      laid_out(output)
  assert not output.exists()
  assert laid_out(output).units_resumed >= 2
  assert_finished(laid_out, output)


@pytest.mark.parametrize('call', ['record', 'seal', 'records'])
def test_arrays_that_were_deleted_from_the_stage(
  laid_out, call, tmp_path, caplog
):
  """Begun, committed or complete: all of it is made again."""
  output, stage = tmp_path / 'out', tmp_path / 'out.mergekit-tmp'
  with pytest.MonkeyPatch.context() as patch:
    interrupted(patch, call, 3 if call == 'record' else 1)
    with pytest.raises(KeyboardInterrupt):
      laid_out(output)
  assert len((stage / 'journal.0.jsonl').read_text().splitlines()) >= 2
  # The elements of the first array, which was recorded first.
  values = (np.arange(512, dtype=np.float32) + ord('a')).tobytes()
  holding = [
    file
    for file in stage.rglob('*')
    if file.is_file() and values in file.read_bytes()
  ]
  assert holding
  for file in holding:
    file.unlink()
  with caplog.at_level('WARNING', logger='absl'):
    assert laid_out(output).units_done == 4
  assert 'cannot be gone on with; the merge begins anew' in caplog.text
  assert_finished(laid_out, output)


@pytest.mark.parametrize('zarr3', [False, True])
@pytest.mark.parametrize('use_ocdbt', [False, True])
def test_nothing_is_missed_that_is_there(use_ocdbt, zarr3, tmp_path):
  """Whatever arrays are called, and however many chunks they have."""
  source, output = tmp_path / 'source', tmp_path / 'out'
  tree = {
    'mlp/~/linear': {'w': jnp.ones((24, 15)), 'b': jnp.float32(3)},
    'mlp': {'v.w': jnp.ones((1030, 512)), 'u': jax.random.key(1)},
  }
  format = {'use_ocdbt': use_ocdbt, 'use_zarr3': zarr3}
  save(source, tree, use_compression=False, **format)
  go_on = lambda: mk.merge_checkpoints(
    mk.average(), experts=[source], output=output, memory_budget='4MiB'
  )
  with pytest.MonkeyPatch.context() as patch:
    interrupted(patch, 'demand_recorded')
    with pytest.raises(KeyboardInterrupt):
      go_on()
  report = go_on()
  # The largest array has several boxes.
  assert report.units_done == 0 and report.units_resumed > 4
  assert not verify.verify(output)


def test_what_every_process_has_written_is_looked_for(sources, tmp_path):
  with pytest.MonkeyPatch.context() as patch:
    interrupted(patch, 'record', 4)
    with pytest.raises(KeyboardInterrupt):
      merge(sources, tmp_path / 'out')
  stage = epath.Path(tmp_path / 'out.mergekit-tmp')
  (first,) = stage.glob('checkpoint*/ocdbt.process_0')
  second = first.parent / 'ocdbt.process_1'
  shutil.copytree(first, second)
  (own,) = journal.read_all(stage)
  is_there = functools.partial(recorded.is_there, stage / 'checkpoint')
  assert is_there([own, own])
  largest = max((second / 'd').iterdir(), key=lambda f: f.stat().length)
  os.truncate(largest, 1000)
  assert not is_there([own, own])
  shutil.rmtree(second)
  assert not is_there([own, own])
  assert is_there([own, {}])


def test_a_complete_checkpoint_whose_journal_lost_a_line(laid_out, tmp_path):
  output = tmp_path / 'out'
  with pytest.MonkeyPatch.context() as patch:
    interrupted(patch, 'records')
    with pytest.raises(KeyboardInterrupt):
      laid_out(output)
  lines = tmp_path / 'out.mergekit-tmp/journal.0.jsonl'
  os.truncate(lines, lines.stat().st_size - 9)
  report = laid_out(output)
  assert (report.units_done, report.units_resumed) == (1, 3)
  assert_finished(laid_out, output)


@pytest.mark.parametrize('renamed', [1, 2])
def test_interrupted_while_it_is_committed(laid_out, renamed, tmp_path):
  """Between an item and its step, or between the step and the note of it."""
  output = tmp_path / 'out'
  with pytest.MonkeyPatch.context() as patch:
    finalize = orbax_write._KeptTemporaryPath.finalize
    left = [renamed]

    async def finalize_and_stop(path):
      await finalize(path)
      left[0] -= 1
      if not left[0]:
        raise KeyboardInterrupt

    patch.setattr(orbax_write._KeptTemporaryPath, 'finalize', finalize_and_stop)
    interrupted(patch, 'seal')
    with pytest.raises(KeyboardInterrupt):
      laid_out(output)
  assert not output.exists()
  stage = tmp_path / 'out.mergekit-tmp'
  lines = stage / 'journal.0.jsonl'
  assert len(lines.read_text().splitlines()) == 4
  # Orbax does not go on with an item that has its name in a step without.
  lost = [*stage.glob('*-tmp'), *stage.glob('*/*-tmp')]
  with pytest.raises(ValueError, match='unfinished merge that differs'):
    laid_out(output, seed=4)
  assert laid_out(output).units_done == (4 if lost else 0)
  assert_finished(laid_out, output)


@pytest.fixture(params=[False, True])
def two(request, sources, tmp_path, monkeypatch):
  """Two merges from one read, killed after the first was put in its place."""
  outputs = {name: tmp_path / name for name in ('a', 'b')}
  for each in outputs.values() if request.param else ():
    checkpoints.save(each, {'params': {'old': np.ones(3)}})
  again = functools.partial(
    merge,
    sources,
    outputs,
    method={'a': mk.average(), 'b': mk.task_arithmetic(0.5)},
    overwrite=request.param,
  )
  with monkeypatch.context() as patch:
    interrupted(patch, '_publish', 2)
    with pytest.raises(KeyboardInterrupt):
      again()
  return outputs, again


def names_in(directory):
  return {path.name for path in directory.iterdir()}


DONE = {'a', 'a.report.json', 'b', 'b.report.json'}


def test_killed_between_two_outputs(two, sources, tmp_path):
  outputs, again = two
  before = checkpoints.digest(outputs['a'])
  with pytest.raises(ValueError, match='seed: 3 then, 4 now'):
    again(seed=4)
  reports = again()
  assert checkpoints.digest(outputs['a']) == before
  assert names_in(tmp_path) == DONE
  for name, method in {'a': mk.average(), 'b': mk.task_arithmetic(0.5)}.items():
    assert reports[name].units_resumed == 4 and not reports[name].units_done
    merge(sources, tmp_path / 'alone', method=method, overwrite=True)
    assert facts(outputs[name]) == facts(tmp_path / 'alone')
    assert_same(outputs[name], restored(tmp_path / 'alone'))


def test_an_output_that_was_moved_away_is_made_again(two, tmp_path):
  outputs, again = two
  outputs['a'].rename(tmp_path / 'moved')
  reports = again()
  assert reports['a'].units_done == 4 and reports['b'].units_resumed == 4
  # They share a read, though only one of them needs it.
  assert reports['a'].bytes_read == reports['b'].bytes_read > 0
  assert names_in(tmp_path) == {*DONE, 'moved'}
  assert_same(outputs['a'], restored(tmp_path / 'moved'))


def test_something_else_lies_where_an_output_was(two, tmp_path):
  outputs, again = two
  outputs['a'].rename(tmp_path / 'moved')
  report = (tmp_path / 'a.report.json').read_text()
  outputs['a'].mkdir()
  (outputs['a'] / 'thesis.tex').write_text('years of work')
  with pytest.raises(FileExistsError, match='a exists'):
    again()
  assert (outputs['a'] / 'thesis.tex').read_text() == 'years of work'
  assert (tmp_path / 'a.report.json').read_text() == report


def test_begun_anew_after_the_first_of_two_outputs(two, tmp_path):
  """Replaces the first one if it may, and else leaves everything there."""
  outputs, again = two
  if again.keywords['overwrite']:
    assert again(resume=False)['a'].units_done == 4
  else:
    with pytest.raises(FileExistsError, match='a exists'):
      again(resume=False)
    assert again()['b'].units_resumed == 4
  assert names_in(tmp_path) == DONE


@pytest.mark.parametrize('layout', ['orbax', 'safetensors'])
def test_what_lies_where_an_output_was_has_its_number(layout, tmp_path):
  """File systems give a new directory the number of one that was removed."""
  output = tmp_path / 'out'
  _, experts = checkpoints.save_set(tmp_path / 'set', {'a': (4, 8)}, experts=2)
  with pytest.raises(KeyboardInterrupt):
    with pytest.MonkeyPatch.context() as patch:
      interrupted(patch, 'clear_replaced')
      mk.merge_checkpoints(
        mk.average(), experts=experts, output=output, format=layout
      )
  assert replace.is_published(epath.Path(output))
  (output / 'notes').write_text('mine')
  assert replace.is_published(epath.Path(output))
  for entry in output.iterdir():
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
  (output / 'thesis.tex').write_text('years of work')
  assert not replace.is_published(epath.Path(output))


def test_an_output_that_cannot_be_put_in_its_place(
  sources, tmp_path, monkeypatch
):
  """What it would have replaced stays, with a report that fits."""
  output = tmp_path / 'out'
  merge(sources, output)
  before = (tmp_path / 'out.report.json').read_text()

  def fail(*arguments):
    raise OSError('no')

  again = functools.partial(
    merge, sources, output, method=mk.task_arithmetic(0.5), overwrite=True
  )
  with monkeypatch.context() as patch:
    patch.setattr(stages.replace, 'publish', fail)
    with pytest.raises(OSError, match='no'):
      again()
  assert verify.verify(output) == []
  assert (tmp_path / 'out.report.json').read_text() == before
  assert again().units_done == 0
  assert verify.verify(output) == []
  assert (tmp_path / 'out.report.json').read_text() != before


def test_a_report_that_could_not_be_written(sources, tmp_path, monkeypatch):
  """The old one stays as long as the new one is not on the disk."""
  output = tmp_path / 'out'
  with monkeypatch.context() as patch:
    patch.setattr(MergeReport, 'save', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      merge(sources, output)
  assert output.exists()
  merge(sources, output)
  assert verify.verify(output) == []
  assert names_in(tmp_path) == {'out', 'out.report.json'}


@pytest.mark.parametrize('text', ['', '{"method": "mk.av'])
def test_a_plan_that_was_cut_off(text, sources, tmp_path, monkeypatch, caplog):
  """By a full disk; what it was of cannot be told, so it begins anew."""
  output = tmp_path / 'out'
  with monkeypatch.context() as patch:
    interrupted(patch, 'record', 3)
    with pytest.raises(KeyboardInterrupt):
      merge(sources, output)
  (tmp_path / 'out.mergekit-tmp' / 'plan.json').write_text(text)
  with caplog.at_level('WARNING', logger='absl'):
    assert not merge(sources, output).units_resumed
  assert 'plan.json is damaged' in caplog.text


def test_numbers_that_look_alike(sources, tmp_path, monkeypatch):
  """Text rounds them; the merge does not go on with others."""
  scales = [np.asarray(0.123456789012), np.asarray(0.123456789912)]
  assert repr(scales[0]) == repr(scales[1])
  output = tmp_path / 'out'
  methods = [mk.task_arithmetic(scale) for scale in scales]
  with monkeypatch.context() as patch:
    interrupted(patch, 'record', 3)
    with pytest.raises(KeyboardInterrupt):
      merge(sources, output, method=methods[0])
  with pytest.raises(ValueError, match=r'differs:\n  numbers\n'):
    merge(sources, output, method=methods[1])
  assert merge(sources, output, method=methods[0]).units_resumed


def test_nan_that_was_allowed_before(tmp_path, monkeypatch):
  """A resume that does not allow it finds it as a merge from the start does."""
  values = lambda *special: {
    name: np.full(6, special[0] if special and name == 'a' else 1, np.float32)
    for name in ('a', 'b', 'c')
  }
  base, expert = tmp_path / 'b.safetensors', tmp_path / 'e.safetensors'
  checkpoints.save_safetensors(base, values())
  checkpoints.save_safetensors(expert, values(np.nan))
  merged = functools.partial(
    mk.merge_checkpoints,
    mk.task_arithmetic(),
    experts=[expert],
    base=base,
    output=tmp_path / 'out',
  )
  with monkeypatch.context() as patch:
    interrupted(patch, 'record', 3)
    with pytest.raises(KeyboardInterrupt):
      merged(allow_nonfinite=True)
  with pytest.raises(FloatingPointError, match='holds 6 non-finite'):
    merged()
  assert not (tmp_path / 'out').exists()
  assert merged(allow_nonfinite=True).units_resumed == 2


def lean(factor=0.5, tilt=(0.0, 1.0), then=lambda total, _: total):
  """A rule whose name and numbers stay when one of its stages is edited."""
  tilt = np.asarray(tilt, np.float32)

  @mk.rule
  class Lean:
    scale: float

    def __call__(self, t, delta):
      mass = yield mk.Total(jnp.sum(delta * delta), then)
      return self.scale * factor * delta * jnp.where(mass > 0, *tilt)

  return mk.chain(mk.weighted_sum(), Lean(0.8))


@pytest.mark.parametrize(
  'edited',
  [{'factor': 0.25}, {'tilt': (2.0, 3.0)}, {'then': lambda total, _: -total}],
  ids=['a number', 'an array', 'a then'],
)
def test_a_rule_that_was_edited(edited, sources, tmp_path, monkeypatch):
  """What the two bodies computed would be mixed in one output."""
  output = tmp_path / 'out'
  assert repr(lean()) == repr(lean(**edited))
  with monkeypatch.context() as patch:
    interrupted(patch, 'record', 3)
    with pytest.raises(KeyboardInterrupt):
      merge(sources, output, method=lean())
  with pytest.raises(ValueError, match=r'differs:\n  code of the method\n'):
    merge(sources, output, method=lean(**edited))
  assert merge(sources, output, method=lean()).units_resumed


def test_a_rule_of_ones_own_where_jit_is_off(sources, tmp_path, monkeypatch):
  """It is the same code."""
  with monkeypatch.context() as patch:
    interrupted(patch, 'record', 3)
    with pytest.raises(KeyboardInterrupt):
      merge(sources, tmp_path / 'out', method=lean())
  with jax.disable_jit():
    assert merge(sources, tmp_path / 'out', method=lean()).units_resumed


@pytest.mark.parametrize('overwrite', [False, True])
def test_killed_before_the_stage_is_removed(
  laid_out, overwrite, tmp_path, monkeypatch
):
  """The output is not replaced by one without the units in its journal."""
  output = tmp_path / 'out'
  publish = stages.replace.publish

  def publish_and_stop(*arguments):
    publish(*arguments)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(stages.replace, 'publish', publish_and_stop)
    with pytest.raises(KeyboardInterrupt):
      laid_out(output)
  assert laid_out(output, overwrite=overwrite).units_resumed == 4
  assert_finished(laid_out, output)


def test_killed_while_a_stage_is_cleared(laid_out, tmp_path, monkeypatch):
  """What is left of it is not taken for what the plan beside it asks."""
  output = tmp_path / 'out'
  with monkeypatch.context() as patch:
    interrupted(patch, 'records')
    with pytest.raises(KeyboardInterrupt):
      laid_out(output)

  def stop_once_the_largest_is_gone(directory, *kept):
    files = filter(os.path.isfile, pathlib.Path(directory).rglob('*'))
    max(files, key=os.path.getsize).unlink()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(replace, 'clear', stop_once_the_largest_is_gone)
    with pytest.raises(KeyboardInterrupt):
      laid_out(output, resume=False)
  assert laid_out(output).units_done == 4
  assert_finished(laid_out, output)


@pytest.mark.parametrize('backwards', [False, True])
def test_killed_while_the_stage_of_what_is_complete_is_cleared(
  laid_out, tmp_path, monkeypatch, backwards
):
  """In whatever order the system lists it, the same merge ends well."""
  output, stage = tmp_path / 'out', tmp_path / 'out.mergekit-tmp'
  listed, unlink = type(epath.Path()).iterdir, type(epath.Path()).unlink
  removed = []

  def unlink_and_stop(path, **options):
    unlink(path, **options)
    if path.parent == stage and output.exists():
      removed.append(path.name)
      if len(removed) == 1:
        raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(
      type(epath.Path()),
      'iterdir',
      lambda path: iter(sorted(listed(path), reverse=backwards)),
    )
    patch.setattr(type(epath.Path()), 'unlink', unlink_and_stop)
    with pytest.raises(KeyboardInterrupt):
      laid_out(output)
    laid_out(output)
  assert_finished(laid_out, output)
  assert removed[:2] == ['journal.0.jsonl'] * 2
  # Until then nobody else begins there.
  assert removed[-1] == locks.NAME


@pytest.mark.parametrize('resume', [True, False])
@pytest.mark.parametrize('call', ['is_empty', 'publish'])
def test_killed_while_an_output_is_replaced(
  call, resume, tmp_path, monkeypatch
):
  """What was moved aside goes, though nobody needs to say overwrite again."""
  output, old = tmp_path / 'out', tmp_path / 'out.mergekit-old'
  _, experts = checkpoints.save_set(tmp_path / 'set', {'a': (4, 8)}, experts=2)
  again = functools.partial(
    mk.merge_checkpoints, mk.average(), experts=experts, output=output
  )
  checkpoints.save(output, {'params': {'old': np.ones(3)}})
  before = checkpoints.digest(output).values()
  done = getattr(replace, call)

  def stop_once_it_is_aside(*arguments):
    found = done(*arguments)
    if old.exists():
      raise KeyboardInterrupt
    return found

  with monkeypatch.context() as patch:
    patch.setattr(replace, call, stop_once_it_is_aside)
    with pytest.raises(KeyboardInterrupt):
      again(overwrite=True)
  assert [*checkpoints.digest(old).values()] == [*before]
  assert output.exists() == (call == 'publish')
  if output.exists() and not resume:
    with pytest.raises(FileExistsError, match='out exists'):
      again(resume=False)
    assert old.exists()
    again()
  else:
    again(resume=resume)
  assert names_in(tmp_path) == {'set', 'out', 'out.report.json'}
  assert not verify.verify(output)


def test_a_full_disk_that_was_cleared(tmp_path):
  """What was written before stays, and a resume needs only the rest.

  No file may grow beyond 1 MiB, as if the disk were full; then it may again.
  """
  shapes = {f'small{i}': (4, 8) for i in range(6)} | {'then': (1024, 512)}
  base, experts = checkpoints.save_set(tmp_path / 'set', shapes, experts=2)
  merge = functools.partial(
    mk.merge_checkpoints,
    mk.task_arithmetic(0.5),
    base=base,
    experts=experts,
    partition_rules={'.*': P()},
  )
  output = tmp_path / 'out'
  free = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, free[1]))
  try:
    with pytest.raises(OSError, match='params/then .*File too large'):
      merge(output=output)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
  assert not output.exists()
  report = merge(output=output)
  # The last leaf, which is copied, may be written beside the one that fails.
  assert report.units_done + report.units_resumed == 8
  assert report.units_resumed in (6, 7)
  written = checkpoints.report_of(output)
  assert written['units_resumed'] == report.units_resumed
  expected = merge(output=tmp_path / 'other')
  compare.same_bits(*map(checkpoints.load, (output, tmp_path / 'other')))
  assert [t.merge_norm for t in report.tensors] == [
    t.merge_norm for t in expected.tensors
  ]


@pytest.mark.parametrize('format', ['orbax', 'safetensors'])
def test_all_is_on_the_disk_before_it_appears(format, tmp_path, monkeypatch):
  """Files and the names of files; and after that, its own name."""
  base, experts = checkpoints.save_set(
    tmp_path / 'set', {'a': (8, 8)}, experts=2
  )
  output = tmp_path / 'out'
  sync, before, after = os.fsync, set(), set()

  def fsync(file):
    sync(file)
    (after if output.exists() else before).add(os.fstat(file).st_ino)

  monkeypatch.setattr(os, 'fsync', fsync)
  mk.merge_checkpoints(
    mk.average(), experts=experts, output=output, format=format
  )
  made = [output, *output.rglob('*')]
  unsynced = [path for path in made if path.stat().st_ino not in before]
  assert not unsynced and len(made) > 1
  assert tmp_path.stat().st_ino in after


def test_fewer_merges_than_were_begun_together(sources, tmp_path):
  """How often leaves are read depends on all rules, and so do their numbers."""
  outputs = {name: tmp_path / name for name in ('a', 'b')}
  methods = {'a': mk.ties(), 'b': mk.ties(zero_mass='majority')}
  with pytest.MonkeyPatch.context() as patch:
    # The writer of one of several runs in a thread, where nobody types Ctrl-C.
    interrupted(patch, 'record', 3, OSError('no room'))
    with pytest.raises(OSError, match='no room'):
      merge(sources, outputs, method=methods)
  with pytest.raises(
    ValueError, match='unfinished merge that differs:\n  units\n'
  ):
    merge(sources, outputs['a'], method=methods['a'])


def test_a_source_that_cannot_be_looked_at_after_it_was_read(
  sources, tmp_path, monkeypatch
):
  """It may be what it was, so what was merged is kept."""
  look, calls = jobs._fingerprints, itertools.count()

  def unreachable_later(models):
    if next(calls) == 1:
      raise OSError('503 Slow Down')
    return look(models)

  monkeypatch.setattr(jobs, '_fingerprints', unreachable_later)
  with pytest.raises(OSError, match='503'):
    merge(sources, tmp_path / 'out')
  report = merge(sources, tmp_path / 'out')
  assert report.units_done == 0 and report.units_resumed
  merge(sources, tmp_path / 'undisturbed')
  assert facts(tmp_path / 'out') == facts(tmp_path / 'undisturbed')


def test_a_source_that_was_moved(tmp_path):
  """The header of a file has where it was, which need not be where it is."""
  source = tmp_path / 'one' / 'model.safetensors'
  source.parent.mkdir()
  checkpoints.save_safetensors(source, {n: jnp.ones(8) for n in 'abcd'})
  go_on = lambda: mk.merge_checkpoints(
    mk.average(), experts=[source], output=tmp_path / 'out'
  )
  with pytest.MonkeyPatch.context() as patch:
    interrupted(patch, 'record', 3)
    with pytest.raises(KeyboardInterrupt):
      go_on()
  source = source.parent.rename(tmp_path / 'another, longer name') / source.name
  assert go_on().units_resumed >= 2
  assert not verify.verify(tmp_path / 'out')
  again = mk.open_checkpoint(tmp_path / 'out')
  assert set(again.specs) == set('abcd')
