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
  packages = 'jax jaxlib numpy scipy orbax-checkpoint tensorstore'.split()
  return {
    'cores': os.cpu_count(),
    'memory_gib': round(memory / 2**30, 1),
    'processor': f'{platform.machine()}, {_processor()}',
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def _processor() -> str:
  cpus = pathlib.Path('/proc/cpuinfo')  # on Linux alone
  return described(cpus.read_text()) if cpus.exists() else 'unknown'


def described(cpuinfo: str) -> str:
  """Describes a processor as exactly as programs are compiled for it.

  Many have the name 'AMD EPYC'; the last bits of sums depend on which it is.

  Args:
    cpuinfo: text of /proc/cpuinfo, of which the first processor is taken.

  Returns:
    Such as 'AMD EPYC, family 25, model 1, stepping 1, avx2'; 'unknown' of
    processors that have no name there.
  """
  first, *_ = cpuinfo.strip().split('\n\n')
  lines = (line.partition(':') for line in first.splitlines())
  told = {key.strip(): value.strip() for key, _, value in lines}
  if 'model name' not in told:
    return 'unknown'
  numbers = {'cpu family': 'family', 'model': 'model', 'stepping': 'stepping'}
  flags = told.get('flags', '').split()
  return ', '.join(
    [
      told['model name'],
      *(f'{name} {told[key]}' for key, name in numbers.items() if key in told),
      *(flag for flag in ('avx2', 'avx512f') if flag in flags),
    ]
  )


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
