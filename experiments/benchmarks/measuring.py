"""What all benchmarks share: commands measured, the machine, the figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import mmap
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from experiments.environment import commit, machine, ROOT

_SAMPLE_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a command took.

  Attributes:
    seconds: wall time, from its start to its end.
    cpu_seconds: of all its threads and children, in user and system mode.
    peak_bytes: the most *anonymous* memory that it ever held (RssAnon, sampled
      every 10 ms): pages of files that are mapped for reading are the page
      cache's and are given back whenever memory is short.
    output: what it printed, warnings and logs included.
  """

  seconds: float
  cpu_seconds: float
  peak_bytes: int
  output: str


def run(
  command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Cost:
  """Runs a command in the repository and measures it."""
  return run_together([command], environment)[0]


def run_together(
  commands: Sequence[Sequence[str]],
  environment: Mapping[str, str] | None = None,
) -> list[Cost]:
  """Runs commands at the same time and measures each of them.

  Args:
    commands: programs with their arguments.
    environment: variables beside those of this process.

  Returns:
    What each of them took.

  Raises:
    RuntimeError: if one failed, with the end of what it printed.
  """
  begin = time.perf_counter()
  running = []
  for command in commands:
    output: Any = tempfile.TemporaryFile('w+', errors='replace')
    process = subprocess.Popen(
      [str(word) for word in command],
      cwd=ROOT,
      env={**os.environ, **(environment or {})},
      stdout=output,
      stderr=subprocess.STDOUT,
    )
    running.append((process, output))
  costs: dict[int, Cost] = {}
  peaks = [0] * len(running)
  try:
    while len(costs) < len(running):
      time.sleep(_SAMPLE_SECONDS)
      for i, (process, output) in enumerate(running):
        if i in costs:
          continue
        peaks[i] = max(peaks[i], anonymous_bytes(process.pid))
        # Not Popen.poll, which forgets what the system says a child has used.
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
          seconds = time.perf_counter() - begin
          process.returncode = os.waitstatus_to_exitcode(status)
          cpu_seconds = usage.ru_utime + usage.ru_stime
          output.seek(0)
          costs[i] = Cost(seconds, cpu_seconds, peaks[i], output.read())
          if process.returncode:
            raise RuntimeError(
              f'{" ".join(map(str, process.args))} ended with '
              f'{process.returncode}:\n{costs[i].output[-3000:]}'
            )
  finally:
    for process, output in running:
      process.kill()
      output.close()
  return [costs[i] for i in range(len(running))]


def anonymous_bytes(process: int) -> int:
  """Anonymous memory of a process now; 0 when it has given all back."""
  status = pathlib.Path(f'/proc/{process}/status').read_text().splitlines()
  kib = [line.split()[1] for line in status if line.startswith('RssAnon')]
  return int(kib[0]) * 1024 if kib else 0


def touch_memory(most: int = 8 * 10**9) -> None:
  """Uses free memory once and gives it back.

  A virtual machine takes five times as long to hand out a page that it has not
  handed out before, and who gets these pages is a matter of luck.

  Args:
    most: bytes; never more than two thirds of what is available.
  """
  lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
  (kib,) = [line.split()[1] for line in lines if line.startswith('MemAvail')]
  size = min(most, int(kib) * 1024 * 2 // 3)
  memory = np.empty(size, np.uint8)
  memory[:: mmap.PAGESIZE] = 1


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """The median of every figure over rows that all have the same ones."""
  return {
    name: statistics.median(row[name] for row in rows) for name in rows[0]
  }


def command(name: str) -> str:
  """How a benchmark was started, without where it keeps its files."""
  arguments = iter(sys.argv[1:])
  shown = []
  for argument in arguments:
    flag, given, _ = argument.partition('=')
    if flag not in _PLACES:
      shown.append(argument)
    elif not given:
      next(arguments, None)
  return ' '.join([f'python -m experiments.benchmarks.{name}', *shown])


_PLACES = ('--json', '--folder', '--environment')


def parser(description: str | None) -> argparse.ArgumentParser:
  """The arguments that every benchmark has."""
  arguments = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  arguments.add_argument(
    '--folder',
    help='where models and outputs are made, and deleted afterwards',
  )
  arguments.add_argument('--json', help='where to write the figures')
  return arguments


def publish(
  name: str, rows: Sequence[Mapping[str, Any]], file: str | None, **facts: Any
) -> None:
  """Prints the figures as a table, and writes them as JSON.

  Args:
    name: the benchmark's.
    rows: the figures.
    file: where to write them, or None.
    **facts: what holds for all rows.
  """
  print(table(rows))
  for fact, value in facts.items():
    print(f'{fact}: {value}')
  if file:
    figures = {
      'command': command(name),
      'commit': commit(),
      'machine': machine(),
      **facts,
      'rows': list(rows),
    }
    pathlib.Path(file).write_text(json.dumps(figures, indent=1) + '\n')


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows as text; a column for every name, in order of first appearance."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join('  '.join(map(str.rjust, line, widths)) for line in cells)


def _shown(value: Any) -> str:
  if value is None:
    return ''
  return f'{value:.4g}' if isinstance(value, float) else str(value)
