"""Bytes past the page cache: what a file holds, and where that cannot be."""

from concurrent import futures
import contextlib
import errno
import mmap
import os

import numpy as np
import pytest

from mergekit_jax.checkpoint import direct

MIB = 2**20


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'file'
  path.write_bytes(bytes(12 * MIB))
  return path


@pytest.fixture
def asked(monkeypatch):
  """Sizes of what is written to the disk at once, by file."""
  sizes = {}
  pwrite = os.pwrite

  def spy(file, data, offset):
    sizes.setdefault(file, []).append((offset, len(data)))
    return pwrite(file, data, offset)

  monkeypatch.setattr(os, 'pwrite', spy)
  return sizes


def random_bytes(size):
  return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def written(path, pieces):
  """Writes pieces at offsets, in threads, and reads the file."""
  file = direct.File(path, direct.Buffer())
  with contextlib.closing(file), futures.ThreadPoolExecutor(4) as pool:
    for done in [
      pool.submit(file.write, memoryview(data), offset)
      for data, offset in pieces
    ]:
      done.result()
    file.sync()
  return np.frombuffer(path.read_bytes(), np.uint8)


def test_pieces_of_any_size_that_meet_anywhere(path):
  whole = random_bytes(12 * MIB)
  # Neighbours share pages of 4 KiB, are shorter than one, or fill many.
  ends = [0, 1, 513, 4096, 5 * MIB + 7, 5 * MIB + 9, 6 * MIB, 11 * MIB + 511]
  pieces = [
    (whole[start:stop], start)
    for start, stop in zip(ends, [*ends[1:], 12 * MIB], strict=True)
  ]
  np.testing.assert_array_equal(written(path, pieces[::-1]), whole)


def test_most_of_a_large_piece_goes_past_the_cache(path, asked):
  if direct.open_direct(path) is None:
    pytest.skip('this file system has no direct writes')
  piece = random_bytes(9 * MIB + 100)
  found = written(path, [(piece, 50)])
  np.testing.assert_array_equal(found[50 : 50 + piece.size], piece)
  assert not found[:50].any()
  assert not found[50 + piece.size :].any()
  through, past = asked.values()
  page = max(4096, mmap.PAGESIZE)
  assert [sum(size for _, size in part) for part in (through, past)] == [
    page - 50 + 150,
    9 * MIB - page,
  ]
  assert all(offset % page == size % page == 0 for offset, size in past)
  assert max(size for _, size in past) <= MIB


def test_a_short_write_is_finished(path, monkeypatch):
  pwrite = os.pwrite
  monkeypatch.setattr(
    os,
    'pwrite',
    lambda file, data, at: pwrite(file, data[: len(data) // 3 + 1], at),
  )
  piece = random_bytes(3 * MIB)
  monkeypatch.setattr(
    direct, 'open_direct', lambda path: os.open(path, os.O_WRONLY)
  )
  found = written(path, [(piece, 123)])
  np.testing.assert_array_equal(found[123 : 123 + piece.size], piece)


def test_without_direct_writes(path, monkeypatch):
  monkeypatch.delattr(os, 'O_DIRECT')
  assert direct.open_direct(path) is None
  piece = random_bytes(5 * MIB)
  found = written(path, [(piece, 77)])
  np.testing.assert_array_equal(found[77 : 77 + piece.size], piece)


@pytest.mark.parametrize('function', ['open', 'pwrite'])
def test_where_the_system_refuses_them(path, monkeypatch, function):
  real = getattr(os, function)
  refused = []

  def refuse(first, second, *more):
    is_direct = second & os.O_DIRECT if function == 'open' else first in refused
    if is_direct:
      raise OSError(errno.EINVAL, 'Invalid argument')
    return real(first, second, *more)

  if not hasattr(os, 'O_DIRECT'):
    pytest.skip('this system has no direct writes')
  if function == 'pwrite':
    refused.append(os.open(path, os.O_WRONLY))
    monkeypatch.setattr(direct, 'open_direct', lambda path: refused[0])
  monkeypatch.setattr(os, function, refuse)
  piece = random_bytes(5 * MIB)
  found = written(path, [(piece, 77)])
  np.testing.assert_array_equal(found[77 : 77 + piece.size], piece)


def test_too_many_open_files_are_not_passed_over(path, monkeypatch):
  """And what was opened before is closed."""
  if not hasattr(os, 'O_DIRECT'):
    pytest.skip('this system has no direct writes')
  real, opened = os.open, []

  def one(path, flags):
    if opened:
      raise OSError(errno.EMFILE, 'Too many open files')
    opened.append(real(path, flags))
    return opened[0]

  monkeypatch.setattr(os, 'open', one)
  with pytest.raises(OSError, match='Too many'):
    direct.File(path, direct.Buffer())
  with pytest.raises(OSError, match='Bad file descriptor'):
    os.fstat(opened[0])


def test_a_full_disk_is_not_passed_over(path, monkeypatch):
  def full(file, data, offset):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'pwrite', full)
  with pytest.raises(OSError, match='No space'):
    written(path, [(random_bytes(5 * MIB), 0)])
