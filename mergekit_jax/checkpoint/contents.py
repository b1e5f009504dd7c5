"""What files hold, and whether they changed, on disks and in object stores.

No more is read than is asked for, and no file stays open: a checkpoint may have
more shards than a process may have descriptors.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import functools
import math
import os

from etils import epath
import tensorstore as ts

from mergekit_jax.checkpoint import remote

# Fills each buffer with the bytes from an offset on.
ReadInto = Callable[[Iterable[tuple[int, memoryview]]], None]


def bytes_of(file: epath.Path) -> Callable[[int, int], bytes]:
  """A function that gives the bytes of a file from one offset up to another.

  It may be called by several threads at once.

  Raises (the function):
    EOFError: the file is shorter.
    OSError: it cannot be read.
  """
  if not isinstance(file, remote.RemotePath):
    return functools.partial(_bytes_between, file)
  store = remote.open_store(file.parent)
  return lambda start, stop: fetched(store, file.name, slice(start, stop), file)


def _bytes_between(file: epath.Path, start: int, stop: int) -> bytes:
  with open(file, 'rb') as opened:
    size = os.fstat(opened.fileno()).st_size
    if stop > size:
      raise EOFError(f'{file} is cut off: it has {size} bytes.')
    opened.seek(start)
    return opened.read(stop - start)


def reads_into(file: str, start: int, length: int) -> ReadInto:
  """A function that fills buffers with bytes of a local file.

  Args:
    file: the file.
    start: offset from which the function counts.
    length: number of bytes from there on that may be read.

  Raises (the function):
    EOFError: the file is shorter.
    OSError: it cannot be read.
  """

  def read_into(runs: Iterable[tuple[int, memoryview]]) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
      for offset, buffer in runs:
        if offset + len(buffer) > length:
          raise EOFError(
            f'{file} holds {length} bytes here, fewer than expected.'
          )
        done = 0
        while done < len(buffer):
          at = start + offset + done
          count = os.preadv(descriptor, [buffer[done:]], at)
          if not count:
            raise EOFError(f'{file} is cut off at byte {at}.')
          done += count
    finally:
      os.close(descriptor)

  return read_into


def fetched(
  store: ts.KvStore, key: str | bytes, byte_range: slice, path: epath.PathLike
) -> bytes:
  """Bytes of an object, of which no more are sent.

  Raises:
    FileNotFoundError: there is no such object.
    EOFError: it is shorter.
    OSError: it cannot be reached.
  """
  # What OCDBT has cached of its tree is not asked for again: it was read when
  # the array was opened, and a checkpoint does not change.
  read = store.read(key, byte_range=byte_range, staleness_bound=-math.inf)
  result = remote.wait(read, path)
  if result.state != 'value':
    raise FileNotFoundError(f'There is nothing at {path}.')
  return result.value


def compare_size(file: epath.Path, size: int) -> int:
  """1 if a file is longer than `size` bytes, 0 if it is as long, else -1.

  TensorStore cannot ask an object store for more.
  """
  if remote.is_local(file):
    actual = os.path.getsize(file)
    return (actual > size) - (actual < size)
  # A damaged header may claim what no request can name.
  if size >= 2**62:
    return -1
  fetch = bytes_of(file)
  for stop, found in ((size + 1, 1), (size, 0)):
    with contextlib.suppress(EOFError):
      fetch(size - 1, stop)
      return found
  return -1


def states(files: Sequence[epath.Path]) -> list[str]:
  """What changes when a file does; reads none of them."""
  if all(map(remote.is_local, files)):
    status = [os.stat(file) for file in files]
    return [f'{s.st_size}\0{s.st_mtime_ns}' for s in status]
  # What the store calls the content: S3's ETag, GCS's generation. All requests
  # are under way before any is waited for.
  top = files[0].parent.parts[:3]
  store = remote.open_store(remote.RemotePath(*top))
  reads = [
    store.read('/'.join(file.parts[3:]), byte_range=slice(0, 0))
    for file in files
  ]
  found = [
    remote.wait(read, file) for file, read in zip(files, reads, strict=True)
  ]
  return [result.stamp.generation.hex() for result in found]


def read_texts(files: Sequence[epath.Path]) -> list[str]:
  """What files hold; all remote ones are under way before any is waited for."""
  if all(map(remote.is_local, files)):
    return [file.read_text() for file in files]
  stores = {
    parent: remote.open_store(parent) for parent in {f.parent for f in files}
  }
  reads = [stores[file.parent].read(file.name) for file in files]
  return [
    remote.wait(read, file).value.decode()
    for read, file in zip(reads, files, strict=True)
  ]
