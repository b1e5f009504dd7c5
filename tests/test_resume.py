"""Killed merges, started again."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mergekit_jax as mk
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
  random = np.random.default_rng(0)
  shapes = {'layers': (6, 128, 512), 'embedding': (1030, 256), 'norm': (77,)}
  handler = ocp.PyTreeCheckpointHandler(use_compression=False)
  with ocp.Checkpointer(handler) as checkpointer:
    base = {k: random.standard_normal(s) for k, s in shapes.items()}
    for name in ('base', 'one', 'two'):
      tree = {
        k: jnp.asarray(v + 0.1 * random.standard_normal(v.shape), jnp.float32)
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
  """Twice killed at different units, then finished: bit for bit the same."""
  method, units, expected = undisturbed
  output = tmp_path / 'out'
  first, second = units // 3, units // 2
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
  arguments |= {'method': mk.average(), 'memory_budget': '1GiB'} | changes
  return mk.merge_checkpoints(**arguments)


def leave_unfinished(sources, output):
  arguments = job(sources, output, 'threshold', kill=[0, 3])
  arguments |= {'method': 'mk.average()', 'memory_budget': '1GiB'}
  codes, printed = run_merge(arguments, devices=8, check=False)
  assert codes == [-9], printed


def test_another_plan_is_refused(sources, tmp_path):
  output = tmp_path / 'out'
  leave_unfinished(sources, output)
  with pytest.raises(ValueError, match='seed: 3 then, 4 now'):
    merge(sources, output, seed=4)
  with pytest.raises(ValueError, match='memory_budget: 1073741824 then, 10'):
    merge(sources, output, memory_budget='1GB')
  with pytest.raises(ValueError, match='unfinished merge that differs'):
    merge(sources, output, experts=[str(sources / 'one')])
  report = merge(sources, output, seed=4, resume=False)
  assert report.units_resumed == 0 and output.exists()


def test_a_source_that_changed_is_refused(sources, tmp_path):
  import os
  import shutil

  copy = tmp_path / 'two'
  shutil.copytree(sources / 'two', copy)
  output = tmp_path / 'out'
  arguments = job(sources, output, 'threshold', kill=[0, 3])
  experts = [str(sources / 'one'), str(copy)]
  arguments |= {'method': 'mk.average()', 'memory_budget': '1GiB'}
  arguments |= {'experts': experts}
  codes, printed = run_merge(arguments, devices=8, check=False)
  assert codes == [-9], printed
  data = next(file for file in copy.rglob('*') if file.stat().st_size > 10**5)
  os.utime(data, ns=(1, 1))
  with pytest.raises(ValueError, match='sources: .*fingerprint'):
    merge(sources, output, experts=experts)


def test_two_merges_into_one_output(sources, tmp_path):
  from mergekit_jax.checkpoint.stage import staged

  output = tmp_path / 'out'
  with pytest.raises(RuntimeError, match='stop'):
    with staged(output, {}, overwrite=False, resume=True):
      with pytest.raises(ValueError, match=r'Another merge \(process \d+ on'):
        merge(sources, output)
      raise RuntimeError('stop')
  assert merge(sources, output).units_resumed == 0


def test_a_failed_merge_is_kept_for_a_resume(sources, tmp_path, monkeypatch):
  """An error leaves what was written, and a resume needs only the rest."""
  from mergekit_jax.checkpoint import orbax_write

  output = tmp_path / 'out'
  write = orbax_write._Writer.__call__
  left = 12  # more than the first box takes on 8 devices, less than all

  def full_disk(self, *arguments):
    nonlocal left
    left -= 1
    if left < 0:
      raise OSError(28, 'No space left on device')
    return write(self, *arguments)

  monkeypatch.setattr(orbax_write._Writer, '__call__', full_disk)
  with pytest.raises(OSError, match='No space left'):
    merge(sources, output)
  assert not output.exists()
  monkeypatch.undo()
  report = merge(sources, output)
  assert report.units_resumed > 0
  written = json.loads((tmp_path / 'out.report.json').read_text())
  assert written['units_resumed'] == report.units_resumed
  expected = merge(sources, tmp_path / 'other')
  assert_same(output, restored(tmp_path / 'other'))
  assert [t.merge_norm for t in report.tensors] == [
    t.merge_norm for t in expected.tensors
  ]
