"""Several processes on one machine merge as one does."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

import mergekit_jax as mk
from tests.launch import report_of, run_merge
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
  arguments['count_bytes'] = True
  _, printed = run_merge(arguments, processes=2)
  size = sum(
    leaf.nbytes
    for name in ('base', 'one', 'two')
    for leaf in restored(sources / name)['params'].values()
    if leaf.nbytes >= 10**6
  )
  for text in printed:
    assert 0.45 * size < report_of(text)['read'] <= 0.55 * size


def test_a_killed_peer_stops_the_others(sources, tmp_path):
  """They end with a message rather than hang, and the merge can resume."""
  arguments = job(sources, tmp_path / 'out', 'threshold')
  codes, printed = run_merge(
    {**arguments, 'kill': [1, 5]}, processes=2, timeout=60, check=False
  )
  assert codes[1] == -9 and codes[0] not in (0, -9)
  assert 'process' in printed[0].lower()
  assert not pathlib.Path(arguments['output']).exists()
  _, printed = run_merge(arguments, processes=2)
  assert report_of(printed[0])['resumed'] > 0
  arguments |= {'method': eval(arguments['method'])}
  mk.merge_checkpoints(**{**arguments, 'output': tmp_path / 'one'})
  assert_same(tmp_path / 'out', restored(tmp_path / 'one'))
