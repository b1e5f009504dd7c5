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
# Of a thread; written data is copied there, as its own address is not aligned.
_BUFFER = 1 << 22
# Less than that is not worth a wait for the disk.
_LEAST = 1 << 20


class File:
  """A file that is there already, open to be written in any order."""

  def __init__(self, path: epath.Path):
    """Opens a file.

    Raises:
      OSError: if it cannot be opened.
    """
    self._file = os.open(path, os.O_WRONLY)
    self._direct = opened(path)
    self._buffers = threading.local()

  def write(self, data: np.ndarray, offset: int) -> None:
    """Writes bytes, uint8 [n], at an offset; threads may do so at once."""
    begin = min(-offset % _BLOCK, data.size)
    end = begin + (data.size - begin) // _BLOCK * _BLOCK
    if self._direct is None or end - begin < _LEAST:
      begin = end = data.size
    files.write_at(self._file, memoryview(data[:begin]), offset)
    for start in range(begin, end, _BUFFER):
      part = data[start : min(start + _BUFFER, end)]
      done = self._write_directly(part, offset + start)
      files.write_at(self._file, memoryview(part[done:]), offset + start + done)
    files.write_at(self._file, memoryview(data[end:]), offset + end)

  def _write_directly(self, part: np.ndarray, offset: int) -> int:
    """Writes whole blocks and returns how many bytes the disk took."""
    if not hasattr(self._buffers, 'aligned'):
      self._buffers.aligned = np.frombuffer(mmap.mmap(-1, _BUFFER), np.uint8)
    aligned = self._buffers.aligned[: part.size]
    np.copyto(aligned, part)
    try:
      return os.pwrite(self._direct, aligned, offset)
    except OSError as error:
      # Some disks have larger blocks.
      if error.errno != errno.EINVAL:
        raise
      return 0

  def sync(self) -> None:
    """Waits until what was written is on the disk."""
    os.fsync(self._file)

  def close(self) -> None:
    """Closes the file."""
    os.close(self._file)
    if self._direct is not None:
      os.close(self._direct)


def opened(path: epath.Path) -> int | None:
  """Opens a file to be written past the page cache, if that can be done."""
  if not hasattr(os, 'O_DIRECT'):
    return None
  try:
    return os.open(path, os.O_WRONLY | os.O_DIRECT)
  except OSError as error:
    # Not every file system can.
    if error.errno != errno.EINVAL:
      raise
    return None
