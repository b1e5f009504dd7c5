"""The preset for a pod, phase by phase, on models of a few thousand numbers."""

import contextlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.scale_study import phases
from experiments.scale_study.analysis import cells
from experiments.scale_study.folder import Arm
from experiments.scale_study.study import Study
from tests.experiments import small_pod
from tests.launch import free_port


@pytest.fixture
def config(tmp_path):
  small_pod.write(tmp_path)
  return small_pod.config(tmp_path)


def test_phases_one_by_one(config, tmp_path):
  """In two processes of half the mesh; one can read what they write."""
  port = str(free_port())
  command = [sys.executable, '-m', small_pod.__name__]
  command += [str(tmp_path), str(tmp_path / 'results'), port, '2']
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  environment |= {'JAX_NUM_CPU_DEVICES': '2'}
  logs = [tmp_path / f'{process}.txt' for process in range(2)]
  with contextlib.ExitStack() as stack:
    running = [
      subprocess.Popen(
        [*command, str(process)],
        env=environment,
        stdout=stack.enter_context(log.open('w')),
        stderr=subprocess.STDOUT,
      )
      for process, log in enumerate(logs)
    ]
    ended = [process.wait() for process in running]
  assert ended == [0, 0], [log.read_text()[-3000:] for log in logs]
  assert (tmp_path / 'results' / 'report.html').exists()
  study = Study(config, tmp_path / 'results', small_pod.FLAGS)
  size = study.size('xs')
  made = cells.load(study.folder.root / 'cells.jsonl')
  assert {(cell.base, cell.setting) for cell in made} == {
    (base, setting)
    for base in cells.BASES
    for setting in ('validated', 'fixed')
  }
  scored = phases.Scored(size, Arm('xs', 'pretrained', 0))
  expert = size.load(
    study.folder.root / scored.experts['sentiment']['checkpoint']
  )
  kernel = expert['layers']['feed_forward']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 8, 8)
  base = size.load(size.base(Arm('xs', 'pretrained', 0)))
  moved = jax.tree.map(lambda one, two: bool((one != two).any()), expert, base)
  assert any(jax.tree.leaves(moved))
  record = scored.base
  with size.on_mesh():
    again = size.examination.scores(base, 'test')
  assert set(again) == set(record['test'])
  for task, score in again.items():
    # As many devices in one process: float32 sums may be added in another
    # order, and each addition rounds by up to 6e-8 of its result.
    np.testing.assert_allclose(score, record['test'][task], rtol=1e-5)


def test_a_vocabulary_that_is_too_large_is_refused(config, tmp_path):
  path = tmp_path / 'model' / 'config.json'
  path.write_text(json.dumps({**small_pod.QWEN, 'vocab_size': 8}))
  study = Study(config, tmp_path / 'results', [])
  with pytest.raises(ValueError, match='only 8. Give their own'):
    study.run(['experts'])
