"""Parts of the study in processes side by side, each started when it may be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
import signal
import subprocess
import sys
import time

from absl import logging

from experiments.scale_study import progress


class PartFailedError(RuntimeError):
  """A process ended with an error."""


def run(
  parts: Mapping[str, Sequence[str]],
  command: Sequence[str],
  *,
  processes: int,
  logs: Path,
) -> None:
  """Runs `command --part=NAME` for each part.

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
  running: dict[str, subprocess.Popen] = {}
  finished = progress.bar(len(parts), 'all', 'part')
  try:
    while running or (waiting and not failed):
      for part in [p for p in waiting if done.issuperset(waiting[p])]:
        if len(running) < processes and not failed:
          del waiting[part]
          running[part] = _start(part, command, logs)
      time.sleep(0.2)
      for part, process in list(running.items()):
        if process.poll() is not None:
          del running[part]
          (failed.append if process.returncode else done.add)(part)
          finished.update()
          logging.info('%s ended with %s', part, process.returncode)
  finally:
    finished.close()
    for process in running.values():
      process.terminate()
    signal.signal(signal.SIGTERM, before)
  if failed:
    tails = ''.join(_tail(_log(logs, part)) for part in failed)
    raise PartFailedError(
      f'{", ".join(failed)} failed; the same command goes on from there.{tails}'
    )


def _start(part: str, command: Sequence[str], logs: Path) -> subprocess.Popen:
  logging.info('%s starts', part)
  with _log(logs, part).open('a') as log:
    return subprocess.Popen(
      [sys.executable, *command, f'--part={part}'], stdout=log, stderr=log
    )


def _log(logs: Path, part: str) -> Path:
  return logs / f'{part.replace("/", "-")}.txt'


def _tail(log: Path) -> str:
  last = log.read_text(errors='replace').splitlines()[-8:]
  return f'\n{log}:\n  ' + '\n  '.join(last)
