"""What figures depend on: the commit, the machine, the packages."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def machine() -> dict[str, Any]:
  """What the figures depend on, and nothing that says whose machine it is."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  packages = ('jax', 'jaxlib', 'numpy', 'orbax-checkpoint', 'tensorstore')
  return {
    'cores': os.cpu_count(),
    'memory_gib': round(memory / 2**30, 1),
    'processor': f'{platform.machine()}, {_processor()}',
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def _processor() -> str:
  cpus = pathlib.Path('/proc/cpuinfo')  # on Linux alone
  lines = cpus.read_text().splitlines() if cpus.exists() else []
  for line in lines:
    if line.startswith('model name'):
      return line.partition(':')[2].strip()
  return 'unknown'


def commit() -> str:
  """The commit that runs, with '+' if its code has been changed."""
  call = ['git', 'rev-parse', '--short=12', 'HEAD']
  try:
    head = subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'  # a copy of the code without its history
  changed = subprocess.run(
    ['git', 'diff', '--quiet', 'HEAD', '--', '*.py'], cwd=ROOT
  )
  return head.stdout.decode().strip() + ('+' if changed.returncode else '')
