"""What is written of an output: of every process, a line for each unit.

On a local disk a line is appended to the file of its process. To an object
nothing can be appended, and writing one often is slow and not allowed. There
the lines of some seconds are put into an object of their own: a process that is
killed loses the work of these seconds.
"""

import collections
from collections.abc import Callable, Mapping
import contextlib
import json
import os
import time
from typing import Any

from etils import epath

from mergekit_jax.checkpoint import contents, remote

_SECONDS = 5

Journal = dict[int, dict[str, Any]]


class Writer:
  """Adds lines to the journal of one process."""

  def __init__(
    self, directory: epath.Path, process: int, demand_ours: Callable[[], None]
  ):
    """Opens the journal.

    Args:
      directory: where the journals are.
      process: number of the process.
      demand_ours: called before something is put into an object store; raises
        if nothing may be put there any more.
    """
    if remote.is_local(directory):
      self._lines: Any = _File(directory / f'journal.{process}.jsonl')
    else:
      self._lines = _Objects(directory, f'journal.{process}', demand_ours)

  def add(self, unit: int, facts: Mapping[str, Any]) -> None:
    self._lines.add(json.dumps({'unit': unit, **facts}) + '\n')

  def flush(self) -> None:
    """Returns when what was added will be there after a power failure."""
    self._lines.flush()

  def close(self) -> None:
    self._lines.close()


class _File:
  def __init__(self, path: epath.Path):
    self._file = open(path, 'ab+')
    if self._file.tell():
      self._file.seek(-1, os.SEEK_END)
      # A line that was cut off would take the next one with it.
      if self._file.read() != b'\n':
        self._file.write(b'\n')

  def add(self, line: str) -> None:
    self._file.write(line.encode())
    self._file.flush()

  def flush(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self.flush()
    self._file.close()


class _Objects:
  def __init__(
    self, directory: epath.Path, stem: str, demand_ours: Callable[[], None]
  ):
    self._directory = directory
    self._stem = stem
    self._demand_ours = demand_ours
    # Those of an earlier run stay as they are.
    names = [child.name for child in directory.iterdir()]
    self._number = sum(name.startswith(f'{stem}.') for name in names)
    self._lines: list[str] = []
    self._put_at = -float('inf')

  def add(self, line: str) -> None:
    self._lines.append(line)
    if time.monotonic() > self._put_at + _SECONDS:
      self.flush()

  def flush(self) -> None:
    if not self._lines:
      return
    self._demand_ours()
    name = f'{self._stem}.{self._number:06}.jsonl'
    (self._directory / name).write_text(''.join(self._lines))
    self._number += 1
    self._lines = []
    self._put_at = time.monotonic()

  def close(self) -> None:
    self.flush()


def read_all(directory: epath.Path) -> list[Journal]:
  """The journals of all processes: what they noted, by unit."""
  journals = _read(directory, 'journal.')
  return [journals[process] for process in sorted(journals)]


def read(directory: epath.Path, process: int) -> Journal:
  """The journal of one process."""
  return _read(directory, f'journal.{process}.')[process]


def remove_all(directory: epath.Path) -> None:
  for file in _files(directory, 'journal.'):
    file.unlink()


def _files(directory: epath.Path, prefix: str) -> list[epath.Path]:
  return sorted(
    child for child in directory.iterdir() if child.name.startswith(prefix)
  )


def _read(directory: epath.Path, prefix: str) -> dict[int, Journal]:
  files = _files(directory, prefix)
  journals: dict[int, Journal] = collections.defaultdict(dict)
  for file, text in zip(files, contents.read_texts(files), strict=True):
    journal = journals[int(file.name.split('.')[1])]
    for line in text.splitlines():
      # The last line of a killed process may be cut off.
      with contextlib.suppress(ValueError):
        facts = json.loads(line)
        journal[facts['unit']] = facts
  return journals
