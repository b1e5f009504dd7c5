"""The methods, and whole `mergekit-jax merge` command lines measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import sys
from typing import Any

from experiments.benchmarks import measuring
from experiments.benchmarks.models import STACKED


@dataclasses.dataclass(frozen=True)
class Method:
  """A method as the command line names it.

  Attributes:
    flags: its name and options.
    reads: how often it must read every model.
    needs_base: whether the base is one of them.
  """

  flags: tuple[str, ...]
  reads: int = 1
  needs_base: bool = True

  def sources(self, models: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The models that it must read, of a base and its experts."""
    return list(models if self.needs_base else models[1:])


METHODS = {
  'average': Method(('--method=average',), needs_base=False),
  'task_arithmetic': Method(('--method=task_arithmetic', '--set=scale=0.3')),
  'ties tensor': Method(('--method=ties', '--set=scope=tensor')),
  'ties model': Method(('--method=ties', '--set=scope=model'), reads=3),
  'dare': Method(('--method=dare',)),
  'dare_ties': Method(('--method=dare_ties',)),
}
LAYERED = tuple(
  f'--stacked_axes={regex}={axis}' for regex, axis in STACKED.items()
)


def merge(
  method: Method,
  models: Sequence[pathlib.Path],
  output: pathlib.Path,
  cache: pathlib.Path,
  flags: Sequence[str] = (),
  processes: int = 1,
) -> dict[str, Any]:
  """Runs `mergekit-jax merge` as a user does, and measures it.

  Args:
    method: the method.
    models: the base and its experts.
    output: where to merge to; what is there is deleted first.
    cache: where compiled programs are kept; a new folder makes a cold start.
    flags: more of the command line.
    processes: how many run it together.

  Returns:
    command_seconds: of the whole command.
    merge_seconds: of the merge, as its report says, without start-up.
    compile_seconds: of these, while anything was traced, lowered, compiled or
      loaded from the cache.
    start_up_seconds: what the command took beside the merge.
    cpu_seconds: of all processes.
    peak_mib: of the process that took most.
    bytes_read, bytes_written: of the weights, by all processes.
  """
  clear(output)
  command = [sys.executable, '-m', 'mergekit_jax', 'merge', *method.flags]
  command += ['--experts', *models[1:], '--output', output, *flags]
  command += ['--base', models[0]] if method.needs_base else []
  costs = measuring.run_together(
    [[*command, *joining] for joining in _joined(processes)],
    {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_LOG_COMPILES': '1'},
  )
  # Of a sweep every report says what all merges together have read.
  report = json.loads(next(_reports(output)).read_text())
  seconds = max(cost.seconds for cost in costs)
  return {
    'command_seconds': seconds,
    'merge_seconds': report['seconds'],
    'compile_seconds': compile_seconds(costs[0].output),
    'start_up_seconds': seconds - report['seconds'],
    'cpu_seconds': sum(cost.cpu_seconds for cost in costs),
    'peak_mib': max(cost.peak_bytes for cost in costs) / 2**20,
    'bytes_read': report['bytes_read'],
    'bytes_written': report['bytes_written'],
  }


def clear(output: pathlib.Path) -> None:
  """Deletes an output and all beside it, and waits until the disk is idle.

  Then the same memory is there for all: see `measuring.touch_memory`.
  """
  for name in (output.name, f'{output.name}.mergekit-tmp'):
    shutil.rmtree(output.parent / name, ignore_errors=True)
  for report in _reports(output):
    report.unlink()
  os.sync()  # or the next to write would wait for what others have written
  measuring.touch_memory()


def _reports(output: pathlib.Path) -> Iterator[pathlib.Path]:
  yield from output.glob('*.report.json')
  yield from output.parent.glob(f'{output.name}.report.json')


def _joined(processes: int) -> list[list[str]]:
  """What each of several processes is told to find the others."""
  if processes == 1:
    return [[]]
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{listener.getsockname()[1]}'
  return [
    [
      f'--coordinator_address={address}',
      f'--num_processes={processes}',
      f'--process_id={process}',
    ]
    for process in range(processes)
  ]


def compile_seconds(log: str) -> float:
  """How long anything was traced, lowered, compiled or loaded.

  Args:
    log: of a command that ran under JAX_LOG_COMPILES, with lines such as
      `W1122 10:36:38.77 1 dispatch.py:204] Finished tracing f for jit in 0.2
      sec`. One may be part of another, so that their times do not add up.
  """
  intervals = []
  for line in _FINISHED.finditer(log):
    hours, minutes, seconds, duration = map(float, line.groups())
    end = 3600 * hours + 60 * minutes + seconds
    intervals.append((end - duration, end))
  total, reached = 0.0, 0.0
  for start, end in sorted(intervals):
    total += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return total


_FINISHED = re.compile(
  r'^\w+ (\d+):(\d+):([\d.]+) .*\] Finished .* in ([\d.e+-]+) sec', re.MULTILINE
)
