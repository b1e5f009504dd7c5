"""The large models, compiled for a pod whose devices are simulated."""

import os
import subprocess
import sys


def test_every_phase_fits_the_devices_of_a_pod():
  process = subprocess.run(
    [sys.executable, '-m', 'experiments.scale_study.compile_pod'],
    env=os.environ | {'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  about, _, *rows = process.stdout.splitlines()
  assert 'data=2, fsdp=32, tensor=8' in about  # 512 devices
  needed = {}
  for name, *gigabytes in map(str.split, rows):
    needed[name] = [float(number) for number in gigabytes]
  assert list(needed) == ['1b', '8b', '24b', '64b']
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
