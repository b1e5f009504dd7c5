"""Boxes of arrays whose bytes lie in row-major order, read by byte ranges.

An object store takes about as long to answer at all as it takes to send a
megabyte. So what lies between short runs is fetched with them, and thrown away;
long runs are fetched by several requests, which bounds the memory they take.
Long runs of a local file are read straight to where they are wanted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import itertools
import math
from typing import Any, TypeVar

import numpy as np

from mergekit_jax.checkpoint import contents, row_major, source

# Bytes from one offset up to another, or None if they are not stored.
Fetch = Callable[[int, int], bytes | None]

_Item = TypeVar('_Item')

# Bytes of a run of a local file that is read without what lies beside it: to
# ask there costs less than to read what belongs to another process.
_APART = 2**14
# Requests of one reader at once, to an object store and to a local disk.
_THREADS, _LOCAL_THREADS = 16, 4
# Bytes of a run of a local file from which on it is read to its place at once.
_DIRECT = 2**15
# Bytes of a local file that one task reads, in one run or in many: to hand a
# short one to another thread costs more than to read it.
_TASK = 2**23


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of an array that lies in one place, in row-major order.

  It is read by the one of `fetch` and `read_into` that is given.

  Attributes:
    origin: where it begins in the array.
    shape: its shape.
    fetch: gives its bytes from one offset up to another, or None if it is not
      stored, because all of it is the fill value.
    read_into: fills buffers with its bytes from an offset on each, which is how
      a local file is read.
  """

  origin: tuple[int, ...]
  shape: tuple[int, ...]
  fetch: Fetch | None = None
  read_into: contents.ReadInto | None = None

  def __post_init__(self):
    if (self.fetch is None) == (self.read_into is None):
      raise ValueError('A piece is read by fetch or by read_into.')


class Reader:
  """Reads boxes out of pieces, in threads."""

  def __init__(self, local: bool = False):
    threads = _LOCAL_THREADS if local else _THREADS
    self._pool = futures.ThreadPoolExecutor(threads, 'read_ranges')

  def read(
    self,
    pieces: Callable[[source.Index], Iterable[Piece]],
    parts: Sequence[tuple[source.Index, np.ndarray]],
    fill: Any = None,
  ) -> source.Future:
    """Starts to read several boxes of one array, each into its buffer.

    Args:
      pieces: gives the pieces that a box touches.
      parts: boxes that do not overlap, and buffers of their shape. If the boxes
        fill the one around them, nothing is asked for twice: short columns of a
        row that lie on several devices come with one request.
      fill: what elements are that are not stored.
    """
    around = tuple(
      slice(min(s.start for s in along), max(s.stop for s in along))
      for along in zip(*(box for box, _ in parts), strict=True)
    )
    size = sum(out.size for _, out in parts)
    if size == np.prod(source.box_shape(around), dtype=np.int64):
      groups = [(around, parts)]
    else:
      groups = [(box, [(box, out)]) for box, out in parts]
    return source.Joined(
      self._pool.submit(work)
      for box, group in groups
      for piece in pieces(box)
      for work in _work(piece, box, group, fill)
    )


def _work(
  piece: Piece,
  box: source.Index,
  parts: Sequence[tuple[source.Index, np.ndarray]],
  fill: Any,
) -> Iterator[Callable[[], None]]:
  """What is to be done to put a piece's elements of a box into the parts."""
  end = tuple(o + n for o, n in zip(piece.origin, piece.shape, strict=True))
  own = tuple(slice(o, e) for o, e in zip(piece.origin, end, strict=True))
  common = row_major.overlap(box, own)
  inside = row_major.moved(common, [-o for o in piece.origin])
  itemsize = parts[0][1].itemsize
  if piece.fetch is not None:
    for span in row_major.spans(piece.shape, inside, itemsize):
      yield functools.partial(
        _fetch_span, piece.fetch, piece, span, parts, fill
      )
  if piece.read_into is not None:
    straight = [_straight(piece, own, part, out) for part, out in parts]
    if min(length for length, _ in straight) >= _DIRECT:
      for (_, runs), (_, out) in zip(straight, parts, strict=True):
        flat: Any = out.reshape(-1).view(np.uint8)
        for task in _tasks(runs):
          yield functools.partial(
            _read_runs, piece.read_into, memoryview(flat), task
          )
      return
    found = row_major.spans(piece.shape, inside, itemsize, _APART)
    for task in _grouped(found, lambda span: span.stop - span.start):
      yield functools.partial(_read_spans, piece.read_into, piece, task, parts)


def _straight(
  piece: Piece, own: source.Index, part: source.Index, out: np.ndarray
) -> tuple[float, Iterable[row_major.Run]]:
  """The runs of a piece that a part's buffer takes, and how long they are."""
  common = row_major.overlap(part, own)
  runs = row_major.runs(
    piece.shape,
    row_major.moved(common, [-o for o in piece.origin]),
    out.shape,
    row_major.moved(common, [-s.start for s in part]),
    out.itemsize,
  )
  first = next(runs, None)
  if first is None:
    return math.inf, ()
  return first[2], itertools.chain([first], runs)


def _tasks(runs: Iterable[row_major.Run]) -> Iterator[list[row_major.Run]]:
  """Runs in lists of about `_TASK` bytes; long ones are cut."""
  cut = (
    (start + first, to + first, min(_TASK, length - first))
    for start, to, length in runs
    for first in range(0, length, _TASK)
  )
  return _grouped(cut, lambda run: run[2])


def _grouped(
  items: Iterable[_Item], size: Callable[[_Item], int]
) -> Iterator[list[_Item]]:
  """Items in lists of at least `_TASK` bytes, but for the last one."""
  task, held = [], 0
  for item in items:
    task.append(item)
    held += size(item)
    if held >= _TASK:
      yield task
      task, held = [], 0
  if task:
    yield task


def _read_runs(
  read_into: contents.ReadInto,
  out: memoryview,
  runs: Sequence[row_major.Run],
) -> None:
  read_into((start, out[to : to + length]) for start, to, length in runs)


def fetching_bytes(largest: int) -> int:
  """Host memory a reader takes at most, if the largest array has so many bytes.

  TensorStore holds an answer twice while it hands it over.
  """
  return 2 * _THREADS * min(row_major.REQUEST, largest)


def _fetch_span(
  fetch: Fetch,
  piece: Piece,
  span: row_major.Span,
  parts: Sequence[tuple[source.Index, np.ndarray]],
  fill: Any,
) -> None:
  """Fetches a span and puts each element where it belongs."""
  _put(fetch(span.start, span.stop), piece, span, parts, fill)


def _read_spans(
  read_into: contents.ReadInto,
  piece: Piece,
  task: Sequence[row_major.Span],
  parts: Sequence[tuple[source.Index, np.ndarray]],
) -> None:
  """Reads spans and puts each element where it belongs."""
  # Fresh memory for every span would take longer than to read it.
  longest = max(span.stop - span.start for span in task)
  reused: Any = np.empty(longest, np.uint8)
  for span in task:
    data = reused[: span.stop - span.start]
    read_into([(span.start, memoryview(data))])
    _put(data, piece, span, parts)


def _put(
  data: Any,
  piece: Piece,
  span: row_major.Span,
  parts: Sequence[tuple[source.Index, np.ndarray]],
  fill: Any = None,
) -> None:
  """Puts the bytes of a span, None for the fill value, into the parts."""
  dtype = parts[0][1].dtype
  here = row_major.moved(span.box, piece.origin)
  if data is None:
    elements = np.broadcast_to(
      np.asarray(0 if fill is None else fill, dtype),
      source.box_shape(span.box),
    )
  else:
    elements = np.ndarray(
      source.box_shape(span.box),
      dtype,
      data,
      strides=row_major.strides(piece.shape, dtype.itemsize),
    )
  for box, out in parts:
    common = row_major.overlap(box, here)
    to = row_major.moved(common, [-s.start for s in box])
    out[to] = elements[row_major.moved(common, [-s.start for s in here])]
