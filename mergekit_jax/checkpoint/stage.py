"""Where an output is made until it is complete: one directory beside it.

`<output>.mergekit-tmp` holds the unfinished checkpoint, the plan it was begun
with, and for every process a journal of the units that are written. A killed
merge leaves it; the same merge started again finds it and does what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import json
import os
import socket
from typing import Any

from absl import logging
from etils import epath
import jax
import orbax.checkpoint as ocp

from mergekit_jax.checkpoint import remote, replace

_PLAN = 'plan.json'
_LOCK = 'lock'


class Stage:
  """The stage of one output, as one process sees it.

  Attributes:
    checkpoint: where the new checkpoint is to be written.
    done: what was recorded of each unit that all processes have written.
  """

  def __init__(self, directory: epath.Path):
    self.directory = directory
    self.checkpoint = directory / 'checkpoint'
    self.done: dict[int, dict[str, Any]] = {}
    self._journal: Any = None

  def open_journal(self) -> None:
    """Reads what all processes have done, then begins to add to it."""
    journals = self._read_journals()
    if journals:
      finished = set.intersection(*(set(journal) for journal in journals))
      own = journals[min(jax.process_index(), len(journals) - 1)]
      self.done = {unit: own[unit] for unit in sorted(finished)}
    _barrier('journals read')
    name = f'journal.{jax.process_index()}.jsonl'
    self._journal = open(self.directory / name, 'a', encoding='utf-8')

  def record(self, unit: int, facts: Mapping[str, Any]) -> None:
    """Notes that this process has written its part of a unit."""
    self._journal.write(json.dumps({'unit': unit, **facts}) + '\n')
    self._journal.flush()

  def records(self) -> list[dict[str, Any]]:
    """What was recorded of every unit, with the parts of all processes."""
    _barrier('journals written')
    units: dict[int, dict[str, Any]] = {}
    for journal in self._read_journals():
      for number, facts in journal.items():
        if number in units:
          parts = units[number]['parts'] + facts['parts']
          facts = {**units[number], 'parts': parts}
        units[number] = facts
    return [units[number] for number in sorted(units)]

  def close(self) -> None:
    if self._journal is not None:
      os.fsync(self._journal.fileno())
      self._journal.close()
      self._journal = None

  def _read_journals(self) -> list[dict[int, dict[str, Any]]]:
    files = sorted(
      self.directory.glob('journal.*.jsonl'),
      key=lambda file: int(file.name.split('.')[1]),
    )
    if len(files) not in (0, jax.process_count()):
      return [{}]
    journals = []
    for file in files:
      journal = {}
      for line in file.read_text().splitlines():
        # The last line of a killed process may be cut off.
        with contextlib.suppress(ValueError):
          facts = json.loads(line)
          journal[facts['unit']] = facts
      journals.append(journal)
    return journals


@contextlib.contextmanager
def staged(
  output: epath.Path,
  plan: Mapping[str, Any],
  *,
  overwrite: bool,
  resume: bool,
) -> Iterator[Stage]:
  """Makes an output in a stage, and puts it in its place when it is complete.

  Args:
    output: where the finished checkpoint is to lie.
    plan: what decides the output bit by bit, by name, as JSON can hold it.
    overwrite: replace an output that exists, once the new one is complete.
    resume: continue the stage of a killed merge; else it is thrown away.

  Yields:
    The stage. If the body raises, the stage stays for a resume if any unit was
    recorded, else it is removed; nothing appears at `output`.

  Raises:
    FileExistsError: if the output exists and may not be replaced.
    ValueError: if the output is remote, another merge into it is running, or
      one with another plan was left unfinished.
  """
  remote.demand_local_output(output)
  output = epath.Path(output).absolute()
  replace.check_destination(output, overwrite)
  stage = Stage(replace.beside(output, 'tmp'))
  with _locked(stage.directory):
    replace.on_primary(lambda: _prepare(stage, plan, resume))
    stage.open_journal()
    try:
      yield stage
    except BaseException:
      stage.close()
      _keep_or_remove(stage)
      raise
    stage.close()
    replace.on_primary(lambda: replace.move(stage.checkpoint, output))
    replace.on_primary(lambda: replace.remove(stage.directory))


def _prepare(stage: Stage, plan: Mapping[str, Any], resume: bool) -> None:
  """Writes the plan into a new stage, or compares it with the one there."""
  plan = json.loads(json.dumps(plan))
  file = stage.directory / _PLAN
  if file.exists() and resume:
    begun = json.loads(file.read_text())
    changed = [key for key in plan | begun if plan.get(key) != begun.get(key)]
    if changed:
      described = '\n  '.join(
        f'{key}: {_short(begun.get(key))} then, {_short(plan.get(key))} now'
        for key in changed
      )
      raise ValueError(
        f'{stage.directory} holds an unfinished merge that differs:\n  '
        f'{described}\nGive the same arguments to finish it, or resume=False '
        '(--noresume) to throw it away.'
      )
    return
  for child in stage.directory.iterdir():
    if child.name != _LOCK:
      child.rmtree() if child.is_dir() else child.unlink()
  file.write_text(json.dumps(plan))


def _keep_or_remove(stage: Stage) -> None:
  if jax.process_index() != 0:
    return
  written = sum(len(journal) for journal in stage._read_journals())
  if written:
    logging.warning(
      'The merge stopped after %d units. They are kept in %s; the same merge, '
      'started again, does what is missing.',
      written,
      stage.directory,
    )
  else:
    replace.remove(stage.directory)


@contextlib.contextmanager
def _locked(directory: epath.Path) -> Iterator[None]:
  """Holds the stage for this job. The system frees a dead owner's lock."""
  if jax.process_index() != 0:
    yield
    return
  directory.mkdir(parents=True, exist_ok=True)
  with open(directory / _LOCK, 'a+', encoding='utf-8') as lock:
    lock.seek(0)
    owner = lock.read().strip()
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(
        f'Another merge ({owner}) is writing to {directory}. Wait for it, or '
        'give another output.'
      ) from error
    if owner:
      logging.warning(
        'Taking over %s from %s, which is gone.', directory, owner
      )
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}')
    lock.flush()
    yield


def _barrier(name: str) -> None:
  ocp.multihost.sync_global_processes(f'mergekit_jax:{name}')


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 200 else f'{text[:200]}…'
