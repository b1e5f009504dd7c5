"""Files on a local disk: room for them, bytes in their places, durability."""

import errno
import os

from etils import epath

from mergekit_jax.checkpoint import remote


def allocate(file: int, size: int, path: epath.Path) -> None:
  """Gives a file its size, on a full disk now and not after hours."""
  try:
    if hasattr(os, 'posix_fallocate'):
      os.posix_fallocate(file, 0, size)
  except OSError as error:
    if error.errno == errno.ENOSPC:
      raise OSError(
        error.errno, f'no room on the disk for {size:,} bytes', str(path)
      ) from error
    # Not every file system can.
    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
      raise
  os.ftruncate(file, size)


def write_at(file: int, data: memoryview, offset: int) -> None:
  # One call writes 2 GiB at most.
  while data:
    written = os.pwrite(file, data, offset)
    data, offset = data[written:], offset + written


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file that holds what it held, or all of this, come what may."""
  if not remote.is_local(path):
    path.write_text(text)
    return
  # No longer than the name itself, which may be as long as names can be.
  new = path.parent / f'{path.stem}-tmp'
  new.write_text(text)
  sync(new)
  new.replace(path)
  sync(path.parent)


def sync(path: epath.Path) -> None:
  """Waits until a file, or the names in a directory, are on the disk."""
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


def sync_all(directory: epath.Path) -> None:
  """Waits until a directory, with all that is in it, is on the disk."""
  for here, _, names in os.walk(directory):
    for name in names:
      sync(epath.Path(here) / name)
    sync(epath.Path(here))
