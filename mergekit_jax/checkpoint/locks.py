"""Which merge a stage belongs to.

A local stage is locked. An object store has no locks: there the newest merge
has it, and an older one finds that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import socket
import uuid

from absl import logging
from etils import epath

from mergekit_jax import processes
from mergekit_jax.checkpoint import remote

NAME = 'lock'


@contextlib.contextmanager
def held(directory: epath.Path) -> Iterator[Callable[[], None]]:
  """Holds the directory of a stage for this job.

  Yields:
    A function that raises ValueError if another merge has taken it over.
  """
  own = ''
  with contextlib.ExitStack() as stack:

    def lock() -> None:
      nonlocal own
      if remote.is_local(directory):
        stack.enter_context(file_locked(directory))
      else:
        own = claimed(directory)

    processes.on_primary(lock)
    # The others cannot read it there: that may be a newer merge's by now.
    own = processes.first_told(own)
    yield lambda: _demand_still(own, directory) if own else None


@contextlib.contextmanager
def file_locked(directory: epath.Path) -> Iterator[None]:
  """Holds a local directory. The system frees a dead owner's lock.

  Raises:
    ValueError: another merge holds it.
    OSError: it cannot be locked, as on some network disks.
  """
  file = directory / NAME
  while True:
    directory.mkdir(parents=True, exist_ok=True)
    with open(file, 'a+', encoding='utf-8') as lock:
      lock.seek(0)
      owner = lock.read().strip()
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise ValueError(
          f'Another merge ({owner}) is writing to {directory}. Wait for it, or '
          'give another output.'
        ) from error
      except OSError as error:
        raise OSError(
          f'{directory} cannot be locked: {error}. Nothing else would keep two '
          'merges from writing there; give an output on a disk with locks.'
        ) from error
      # An owner that was done may have removed the file since it was opened.
      # Nobody else would find a lock on it.
      if not _is_at(file, lock.fileno()):
        continue
      if owner:
        logging.warning(
          'Taking over %s from %s, which is gone.', directory, owner
        )
      lock.truncate(0)
      lock.write(f'process {os.getpid()} on {socket.gethostname()}')
      lock.flush()
      yield
      return


def _is_at(path: epath.Path, file: int) -> bool:
  """Whether an open file is what lies at a path."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def claimed(directory: epath.Path) -> str:
  """Claims a directory in an object store, which has no locks.

  Nobody can tell there whether an owner is alive. So the newest one has it, and
  an older one that is still running stops when it next notes what is written.

  Returns:
    What says there whose it is.
  """
  lock = directory / NAME
  if lock.exists():
    logging.warning(
      'Taking over %s from %s. If that is still running, it will stop.',
      directory,
      lock.read_text(),
    )
  own = f'process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4()})'
  lock.write_text(own)
  return own


def _demand_still(own: str, directory: epath.Path) -> None:
  lock = directory / NAME
  owner = lock.read_text() if lock.exists() else 'nobody'
  if owner != own:
    raise ValueError(
      f'Another merge ({owner}) has taken over {directory}. Let that one '
      'finish, or give another output.'
    )
