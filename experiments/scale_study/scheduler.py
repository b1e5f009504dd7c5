"""Parts of the study in processes side by side, each started when it may be."""

from collections.abc import Mapping, Sequence
import contextlib
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import logging

from experiments.scale_study import progress

# Of a log, in which its last line is looked for.
_TAIL_BYTES = 4096


class PartFailedError(RuntimeError):
  """A process ended with an error."""


class _Running(NamedTuple):
  """A part that is being worked on.

  Attributes:
    process: that works on it.
    log: where it prints.
    before: bytes in the log of earlier runs.
    line: shows what it printed last.
  """

  process: subprocess.Popen
  log: Path
  before: int
  line: Any


def run(
  parts: Mapping[str, Sequence[str]],
  command: Sequence[str],
  *,
  processes: int,
  logs: Path,
) -> None:
  """Runs `command --part=NAME` for each part.

  A bar counts the parts; below it stands what each that runs printed last.

  Args:
    parts: names of the parts and what each comes after, long ones first.
    command: of one part.
    processes: how many at once.
    logs: folder for what they print.

  Raises:
    PartFailedError: if a part fails; those that run are finished first.
  """
  logs.mkdir(parents=True, exist_ok=True)
  # A signal to end is for the processes as well: let `finally` see to it.
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
  waiting, done, failed = dict(parts), set(), []
  running: dict[str, _Running] = {}
  with contextlib.ExitStack() as shown:
    finished = shown.enter_context(progress.bar(len(parts), 'all', 'part'))
    free = [
      shown.enter_context(progress.line(place))
      for place in range(min(processes, len(parts)), 0, -1)
    ]
    try:
      while running or (waiting and not failed):
        for part in [p for p in waiting if done.issuperset(waiting[p])]:
          if free and not failed:
            del waiting[part]
            running[part] = _start(part, command, logs, free.pop())
        time.sleep(0.2)
        for part, one in list(running.items()):
          _show(one)
          if one.process.poll() is not None:
            del running[part]
            free.append(one.line)
            progress.say(one.line, '')
            returned = one.process.returncode
            (failed.append if returned else done.add)(part)
            finished.update()
            logging.info('%s ended with %s', part, returned)
    finally:
      for one in running.values():
        one.process.terminate()
      signal.signal(signal.SIGTERM, before)
  if failed:
    tails = ''.join(_tail(_log(logs, part)) for part in failed)
    raise PartFailedError(
      f'{", ".join(failed)} failed; the same command goes on from there.{tails}'
    )


def _start(
  part: str, command: Sequence[str], logs: Path, line: Any
) -> _Running:
  logging.info('%s starts', part)
  progress.say(line, f'{part} starts')
  path = _log(logs, part)
  with path.open('a') as log:
    before = log.tell()
    process = subprocess.Popen(
      [sys.executable, *command, f'--part={part}'], stdout=log, stderr=log
    )
  return _Running(process, path, before, line)


def _show(one: _Running) -> None:
  """Shows the last whole line that a part has printed."""
  with one.log.open('rb') as log:
    log.seek(max(one.before, one.log.stat().st_size - _TAIL_BYTES))
    *lines, _ = log.read().decode(errors='replace').split('\n')
  if lines:
    progress.say(one.line, lines[-1])


def _log(logs: Path, part: str) -> Path:
  return logs / f'{part.replace("/", "-")}.txt'


def _tail(log: Path) -> str:
  last = log.read_text(errors='replace').splitlines()[-8:]
  return f'\n{log}:\n  ' + '\n  '.join(last)
