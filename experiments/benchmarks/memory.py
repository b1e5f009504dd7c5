"""Peak memory of a streamed merge against the size of the model.

    python -m experiments.benchmarks.memory --gigabytes 0.25 1.3

Every method merges a base and 4 experts in a process of its own. The figure is
the most *anonymous* memory that the process ever held (RssAnon, sampled): pages
of the source files that the kernel maps for reading are the page cache's and
are given back whenever memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time

METHODS = {
  'average': {},
  'task_arithmetic': {'scale': 0.3},
  'dare_ties': {},
  'ties model': {'scope': 'model'},
  'ties tensor': {'scope': 'tensor'},
}


def anonymous_bytes() -> int:
  """Anonymous memory of this process now."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('RssAnon'):
      return int(line.split()[1]) * 1024
  raise OSError('/proc/self/status has no RssAnon line; run this on Linux.')


class PeakMemory:
  """Samples the anonymous memory of this process while in the context."""

  def __enter__(self):
    self.peak = self.start = anonymous_bytes()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._sample, daemon=True)
    self._thread.start()
    return self

  def _sample(self):
    while not self._stop.wait(0.01):
      self.peak = max(self.peak, anonymous_bytes())

  def __exit__(self, *error):
    self._stop.set()
    self._thread.join()
    self.peak = max(self.peak, anonymous_bytes())


def merge_one(folder: pathlib.Path, name: str, budget: str) -> dict:
  """Merges with one method; run in a process of its own."""
  from experiments.benchmarks.models import STACKED
  import mergekit_jax as mk

  method = getattr(mk, name.split()[0])(**METHODS[name])
  experts = sorted(folder.glob('expert_*'))
  with PeakMemory() as memory:
    start = time.perf_counter()
    report = mk.merge_checkpoints(
      method,
      experts=experts,
      base=folder / 'base',
      output=folder / 'merged',
      memory_budget=budget,
      stacked_axes=STACKED,
      overwrite=True,
    )
    seconds = time.perf_counter() - start
  return {
    'method': name,
    'gigabytes_read': report.bytes_read / 1e9,
    'seconds': round(seconds, 2),
    'peak_mib': round(memory.peak / 2**20),
    'before_mib': round(memory.start / 2**20),
    'units': report.units_done,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--gigabytes', nargs='+', type=float, default=[0.25, 1.3])
  parser.add_argument('--experts', type=int, default=4)
  parser.add_argument('--memory_budget', default='512MiB')
  parser.add_argument('--compress', action='store_true')
  parser.add_argument('--folder', help='where the models are kept')
  parser.add_argument('--json', help='where to write the figures')
  parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.one:
    folder, name = arguments.one
    result = merge_one(pathlib.Path(folder), name, arguments.memory_budget)
    print('RESULT', json.dumps(result))
    return
  with tempfile.TemporaryDirectory() as temporary:
    rows = []
    for size in arguments.gigabytes:
      folder = pathlib.Path(arguments.folder or temporary) / f'{size}GB'
      make_set(folder, size, arguments.experts, arguments.compress)
      rows += [run_one(folder, name, arguments, size) for name in METHODS]
  if arguments.json:
    from experiments.benchmarks.models import command

    figures = {'command': command('memory'), 'cores': os.cpu_count()}
    figures |= {'python': platform.python_version(), 'rows': rows}
    pathlib.Path(arguments.json).write_text(
      json.dumps(figures, indent=1) + '\n'
    )


def make_set(folder, size: float, experts: int, compress: bool) -> None:
  code = (
    'import pathlib, sys; from experiments.benchmarks.models import save_set; '
    'save_set(pathlib.Path(sys.argv[1]), *map(eval, sys.argv[2:]))'
  )
  call = [sys.executable, '-c', code, str(folder), str(size), str(experts)]
  flags = '--xla_force_host_platform_device_count=8'
  environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  subprocess.run([*call, str(compress)], check=True, env=environment)


def run_one(folder, name: str, arguments, size: float) -> dict:
  module = [sys.executable, '-m', 'experiments.benchmarks.memory']
  call = [*module, '--one', str(folder), name]
  call += ['--memory_budget', arguments.memory_budget]
  environment = {'JAX_NUM_CPU_DEVICES': str(os.cpu_count())} | os.environ
  done = subprocess.run(
    call, check=True, env=environment, capture_output=True, text=True
  )
  line = next(x for x in done.stdout.splitlines() if x.startswith('RESULT'))
  row = {'gigabytes': size, **json.loads(line.removeprefix('RESULT '))}
  print(row, flush=True)
  return row


if __name__ == '__main__':
  main()
