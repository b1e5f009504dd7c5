"""The large models, compiled for pods that are not there."""

import os
import subprocess
import sys

import pytest

from tests.experiments import unoptimized

# A quarter of the time for a v5e, where 64b then trains in 3 % less memory.
_LITTLE_EFFORT = {'JAX_EXEC_TIME_OPTIMIZATION_EFFORT': '-1.0'}
# Nor are the merges' kernels for simulated devices run.
_XLA_FLAGS = {'XLA_FLAGS': unoptimized.XLA_FLAGS}
# libtpu warns in files of its own otherwise.
_ON_STDERR = {'TPU_LOG_DIR': 'disabled', 'TPU_STDERR_LOG_LEVEL': '1'}


def check_that_phases_fit(axes, sizes, *flags):
  """Compiles sizes, none of which may need 16 GB or gather a whole array."""
  command = [sys.executable, '-m', 'experiments.scale_study.compile_pod']
  command += [*flags, *(f'--size={size}' for size in sizes)]
  process = subprocess.run(
    command,
    env=os.environ | _XLA_FLAGS | _LITTLE_EFFORT | _ON_STDERR,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  about, _, *rows = process.stdout.splitlines()
  assert axes in about
  needed = {}
  for name, *gigabytes in map(str.split, rows):
    needed[name] = [float(number) for number in gigabytes]
  assert list(needed) == sizes
  for name, (training, scoring, writing, merging) in needed.items():
    # Parameters and two statistics in float32, divided among 32 · 8 devices.
    parameters = 4 * int(name.removesuffix('b')) / 256
    assert 3 * 0.98 * parameters < training < 16
    assert 0.98 * parameters < scoring < 16
    assert 0.98 * parameters < writing < 16
    # The base and twelve merges.
    assert 13 * 0.98 * parameters < merging < 16
  # The partitioner says this where it has to gather a whole array.
  assert 'full rematerialization' not in process.stderr


def test_every_phase_fits_simulated_devices():
  sizes = ['1b', '8b', '24b', '64b']
  check_that_phases_fit('data=2, fsdp=32, tensor=8', sizes)


def test_every_phase_fits_tpus():
  """The largest, on chips of 16 GB, as their own compiler compiles it."""
  pytest.importorskip('libtpu', reason="needs TPU's compiler")
  check_that_phases_fit(
    'v5e:16x16, data=1, fsdp=32, tensor=8', ['64b'], '--topology=v5e:16x16'
  )
