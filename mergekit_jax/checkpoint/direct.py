"""Bytes to the disk without the page cache between.

A merge is written once and read by others. Each page that the cache would keep
of it is memory that the system has to find first, which can cost more than the
merge; and it would push out what is still to be read.
"""

import errno
import mmap
import os
import threading

from etils import epath
import numpy as np

from mergekit_jax.checkpoint import files

# Where file systems take it, what is written past the page cache begins and
# ends at a page of it, so that no page is written both ways.
_BLOCK = max(4096, mmap.PAGESIZE)
# Bytes that are written at once; less is not worth a wait for the disk.
_PIECE = 1 << 20
# Of file systems, or disks with larger blocks, that have no direct writes.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class Buffer(threading.local):
  """Aligned memory of each thread, to which it copies what it writes."""

  def __init__(self):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    self.aligned = memoryview(mmap.mmap(-1, _PIECE, flags))


class File:
  """A file that is there already, open to be written in any order."""

  def __init__(self, path: epath.Path, buffer: Buffer):
    """Opens a file.

    Args:
      path: of the file.
      buffer: one for all files that the same threads write.

    Raises:
      OSError: if it cannot be opened.
    """
    self._file = os.open(path, os.O_WRONLY)
    try:
      direct = open_direct(path)
    except OSError:
      os.close(self._file)
      raise
    self._direct = self._file if direct is None else direct
    self._refused = direct is None
    self._buffer = buffer

  def write(self, data: memoryview, offset: int) -> None:
    """Writes bytes at an offset; threads may do so at once."""
    begin = min(-offset % _BLOCK, len(data))
    end = begin + (len(data) - begin) // _BLOCK * _BLOCK
    if self._refused or end - begin < _PIECE:
      begin = end = len(data)
    files.write_at(self._file, data[:begin], offset)
    for start in range(begin, end, _PIECE):
      part = data[start : min(start + _PIECE, end)]
      done = self._write_directly(part, offset + start)
      files.write_at(self._file, part[done:], offset + start + done)
    files.write_at(self._file, data[end:], offset + end)

  def _write_directly(self, part: memoryview, offset: int) -> int:
    """Writes whole blocks and returns how many bytes the disk took."""
    if self._refused:
      return 0
    aligned = self._buffer.aligned[: len(part)]
    # Unlike a copy by slices it lets other threads work.
    np.copyto(np.frombuffer(aligned, np.uint8), np.frombuffer(part, np.uint8))
    try:
      return os.pwrite(self._direct, aligned, offset)
    except OSError as error:
      if error.errno not in _REFUSALS:
        raise
      self._refused = True
      return 0

  def sync(self) -> None:
    """Waits until what was written is on the disk."""
    os.fsync(self._file)

  def close(self) -> None:
    """Closes the file."""
    for file in {self._file, self._direct}:
      os.close(file)


def open_direct(path: epath.Path) -> int | None:
  """Opens a file to be written past the page cache, if that can be done.

  Raises:
    OSError: if it cannot be opened for another reason.
  """
  if not hasattr(os, 'O_DIRECT'):
    return None
  try:
    return os.open(path, os.O_WRONLY | os.O_DIRECT)
  except OSError as error:
    if error.errno not in _REFUSALS:
      raise
    return None
