"""The command line."""

import json
import os
import subprocess
import sys

import pytest

from tests.experiments import unoptimized


def run(*flags):
  devices = os.environ['XLA_FLAGS']
  return subprocess.run(
    [sys.executable, '-m', 'experiments.scale_study', *flags],
    env=os.environ | {'XLA_FLAGS': f'{devices} {unoptimized.XLA_FLAGS}'},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--set=expert_step=3', 'Did you mean expert_steps?'),
    ('--preset=cpus', 'Did you mean cpu?'),
    ('--phase=marge', 'Did you mean merge?'),
    ('--phase=merge', 'do --phase=evaluate first'),
    ('--process_id=1', 'nothing says where the processes meet'),
    ('--part=xs/pretrainde/0', 'Did you mean xs/pretrained/0?'),
    ('--output_dir=gs://bucket/out', 'or one of a file system that is mounted'),
  ],
)
def test_a_mistake_is_named(flag, message, tmp_path):
  process = run(f'--output_dir={tmp_path}', flag)
  assert process.returncode != 0
  assert message in process.stdout + process.stderr
  assert 'Traceback' not in process.stderr


def test_processes_without_a_mesh_are_not_joined(tmp_path):
  process = run(
    '--preset=cpu',
    '--set=processes=1',
    '--coordinator_address=127.0.0.1:1',
    f'--output_dir={tmp_path}',
  )
  assert process.returncode == 1
  assert 'share a mesh, and the preset has none' in process.stderr


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'logs').write_text('where the folder of the locks should be')
  process = run('--phase=bases', f'--output_dir={tmp_path}')
  assert process.returncode == 1
  assert f"'{tmp_path}/logs'" in process.stderr
  assert 'Traceback' not in process.stderr


def test_smoke_is_for_the_cpu_whatever_else_there_is(tmp_path):
  """Its simulated devices are CPUs, two unless the user has said more."""
  code = (
    'import sys; from absl import flags; import jax; '
    'from experiments.scale_study import __main__ as main, study; '
    'study.Study.run = lambda *_: print(jax.config.jax_platforms, '
    'jax.device_count()); '
    'flags.FLAGS(sys.argv); main.main(sys.argv[:1])'
  )
  hidden = {'JAX_PLATFORMS', 'XLA_FLAGS', 'JAX_NUM_CPU_DEVICES'}
  process = subprocess.run(
    [sys.executable, '-c', code, f'--output_dir={tmp_path}'],
    capture_output=True,
    text=True,
    env={k: v for k, v in os.environ.items() if k not in hidden},
    check=True,
  )
  assert 'cpu 2' in process.stdout


def test_what_is_not_installed_is_named(tmp_path):
  """As where the `study` extra is missing."""
  code = (
    "import runpy, sys; sys.modules['optax'] = None;"
    "runpy.run_module('experiments.scale_study', run_name='__main__')"
  )
  process = subprocess.run(
    [sys.executable, '-c', code, f'--output_dir={tmp_path}'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode != 0
  assert 'needs optax' in process.stderr
  assert "pip install -e '.[study]'" in process.stderr
  assert 'Traceback' not in process.stderr


def test_smoke_fails_if_an_expert_does_not_learn(tmp_path):
  """A run that is too short: its scores are shown, and its end is an error."""
  short = {
    'categories': 'topic_classification,sentiment',
    'merged': 2,
    'pretrain_steps': 2,
    'expert_steps': 2,
    'multitask_steps': 2,
    'validation_examples': 4,
    'test_examples': 8,
  }
  process = run(
    '--preset=smoke',
    f'--output_dir={tmp_path}',
    *(f'--set={name}={value}' for name, value in short.items()),
  )
  assert process.returncode == 1, process.stderr[-2000:]
  assert 'sentiment, size xs, pretrained base, seed 0: the' in process.stderr
  *_, picture, report = process.stdout.splitlines()
  assert picture == f'Wrote {tmp_path}/figures/scores.png'
  assert (tmp_path / 'figures/scores.png').read_bytes().startswith(b'\x89PNG')
  assert report == f'Wrote {tmp_path}/report.html'
  cell = json.loads((tmp_path / 'cells.jsonl').read_text().splitlines()[0])
  assert f' --output_dir={tmp_path} --cell=xs/pretrained/0/' in cell['command']
  header, *rows = process.stdout.splitlines()
  assert header.split()[-4:] == [
    *('average', 'task_arithmetic', 'dare_ties', 'ties')
  ]
  assert {row.split()[0] for row in rows[:2]} == {
    *('topic_classification', 'sentiment')
  }
