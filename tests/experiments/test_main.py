"""The command line."""

import subprocess
import sys


def test_an_unknown_field_is_a_usage_error():
  process = subprocess.run(
    [sys.executable, '-m', 'experiments.scale_study', '--set=widht=32'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode != 0
  assert 'Did you mean width?' in process.stdout + process.stderr
