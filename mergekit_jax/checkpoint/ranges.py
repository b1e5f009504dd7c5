"""Boxes of arrays whose bytes lie in row-major order, fetched by byte ranges.

An object store takes about as long to answer at all as it takes to send a
megabyte. So what lies between short runs is fetched with them, and thrown away;
long runs are fetched in pieces, which bounds the memory they take.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

from mergekit_jax.checkpoint import contents, source

# Bytes of one request, if it is not a single element.
_PIECE = 2**21
# Bytes between two runs that are fetched rather than asked around.
_HOLE = 2**18
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


# Offsets of the same bytes in two arrays, and how many they are.
_Run = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Block:
  """A part of an array that lies in one place, in row-major order.

  Attributes:
    fetch: gives its bytes from one offset up to another, or None if it is not
      stored, because all of it is the fill value.
    origin: where it begins in the array.
    shape: its shape.
    read_into: fills buffers with its bytes from an offset on each, which is how
      a local file is read; None where bytes can only be fetched.
  """

  fetch: Callable[[int, int], Any]
  origin: tuple[int, ...]
  shape: tuple[int, ...]
  read_into: contents.ReadInto | None = None


class Reader:
  """Reads boxes out of blocks, in threads."""

  def __init__(self, local: bool = False):
    threads = _LOCAL_THREADS if local else _THREADS
    self._pool = futures.ThreadPoolExecutor(threads, 'read_ranges')

  def read(
    self,
    blocks: Callable[[source.Index], Iterable[Block]],
    parts: Sequence[tuple[source.Index, np.ndarray]],
    fill: Any = None,
  ) -> source.Future:
    """Starts to read several boxes of one array, each into its buffer.

    Args:
      blocks: gives the blocks that a box touches.
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
      for block in blocks(box)
      for work in _work(block, box, group, fill)
    )


def _work(
  block: Block,
  box: source.Index,
  parts: Sequence[tuple[source.Index, np.ndarray]],
  fill: Any,
) -> Iterator[Callable[[], None]]:
  """What is to be done to put a block's elements of a box into the parts."""
  end = tuple(o + n for o, n in zip(block.origin, block.shape, strict=True))
  own = tuple(slice(o, e) for o, e in zip(block.origin, end, strict=True))
  common = _overlap(box, own)
  inside = _moved(common, [-o for o in block.origin])
  itemsize = parts[0][1].itemsize
  local = block.read_into is not None
  if block.read_into is not None:
    straight = [_straight(block, own, part, out) for part, out in parts]
    if min(length for length, _ in straight) >= _DIRECT:
      for (_, runs), (_, out) in zip(straight, parts, strict=True):
        flat: Any = out.reshape(-1).view(np.uint8)
        for task in _tasks(runs):
          yield functools.partial(
            _read_runs, block.read_into, memoryview(flat), task
          )
      return
  found = spans(block.shape, inside, itemsize, _APART if local else None)
  for task in _together(found, _TASK if local else 0):
    yield functools.partial(_copy, block, task, parts, fill)


def _straight(
  block: Block, own: source.Index, part: source.Index, out: np.ndarray
) -> tuple[float, Iterable[_Run]]:
  """The runs of a block that a part's buffer takes, and how long they are."""
  common = _overlap(part, own)
  runs = _runs(
    block.shape,
    _moved(common, [-o for o in block.origin]),
    out.shape,
    _moved(common, [-s.start for s in part]),
    out.itemsize,
  )
  first = next(runs, None)
  if first is None:
    return math.inf, ()
  return first[2], itertools.chain([first], runs)


def _runs(
  shape: Sequence[int],
  box: source.Index,
  out_shape: Sequence[int],
  out_box: source.Index,
  itemsize: int,
) -> Iterator[_Run]:
  """What lies in one piece both in a box and where it is to go.

  Args:
    shape: of the row-major array that has the box.
    box: what is to be moved.
    out_shape: of the row-major array where it is to go.
    out_box: of the same shape, where it is to go.
    itemsize: bytes of an element.

  Yields:
    Offset in the one, offset in the other, and length, in bytes.
  """
  counts = source.box_shape(box)
  if 0 in counts:
    return
  # The axes from here on are whole in both, but for the first of them.
  first = len(counts)
  while first > 0 and tuple(counts[first:]) == tuple(shape[first:]) == tuple(
    out_shape[first:]
  ):
    first -= 1
  steps = _strides(shape, itemsize), _strides(out_shape, itemsize)
  length = math.prod(counts[first:]) * itemsize
  for index in itertools.product(*map(range, counts[:first])):
    at = (*index, *[0] * (len(counts) - first))
    start, to = (
      sum((s.start + i) * step for s, i, step in zip(b, at, by, strict=True))
      for b, by in zip((box, out_box), steps, strict=True)
    )
    yield start, to, length


def _tasks(runs: Iterable[_Run]) -> Iterator[list[_Run]]:
  """Runs in lists of about `_TASK` bytes; long ones are cut."""
  task, held = [], 0
  for start, to, length in runs:
    for first in range(0, length, _TASK):
      size = min(_TASK, length - first)
      task.append((start + first, to + first, size))
      held += size
      if held >= _TASK:
        yield task
        task, held = [], 0
  if task:
    yield task


def _read_runs(
  read_into: contents.ReadInto,
  out: memoryview,
  runs: Sequence[_Run],
) -> None:
  read_into((start, out[to : to + length]) for start, to, length in runs)


def fetching_bytes(largest: int) -> int:
  """Host memory a reader takes at most, if the largest array has so many bytes.

  TensorStore holds an answer twice while it hands it over.
  """
  return 2 * _THREADS * min(_PIECE, largest)


@dataclasses.dataclass(frozen=True)
class Span:
  """Bytes of a block that are fetched at once, for the elements of a box.

  Attributes:
    start: offset of the first byte.
    stop: offset behind the last byte.
    box: the elements, counted from the origin of the block.
  """

  start: int
  stop: int
  box: source.Index


def spans(
  shape: Sequence[int],
  box: source.Index,
  itemsize: int,
  apart: int | None = None,
) -> Iterator[Span]:
  """Cuts a box of a row-major block into what one request each should bring.

  Args:
    shape: shape of the block.
    box: a box of it.
    itemsize: bytes of an element.
    apart: bytes of a run from which on no hole is fetched with it; None if
      there is no such length.
  """
  steps = _strides(shape, itemsize)

  def cut(box: source.Index) -> Iterator[Span]:
    counts = source.box_shape(box)
    start = sum(s.start * step for s, step in zip(box, steps, strict=True))
    extents = [(n - 1) * step for n, step in zip(counts, steps, strict=True)]
    stop = start + sum(extents) + itemsize
    axis = next((i for i, count in enumerate(counts) if count > 1), None)
    if axis is None:
      yield Span(start, stop, box)
      return
    # The largest one: those along the later axes lie inside of rows.
    run = stop - start - extents[axis]
    hole = steps[axis] - run
    joined = not hole or hole <= _HOLE and (apart is None or run < apart)
    rows = max(1, _PIECE // steps[axis]) if joined else 1
    if rows >= counts[axis]:
      yield Span(start, stop, box)
      return
    for first in range(box[axis].start, box[axis].stop, rows):
      last = min(first + rows, box[axis].stop)
      yield from cut((*box[:axis], slice(first, last), *box[axis + 1 :]))

  if 0 not in source.box_shape(box):
    yield from cut(tuple(box))


def _together(spans: Iterable[Span], size: int) -> Iterator[list[Span]]:
  """Spans in lists of at least so many bytes, but for the last one."""
  task, held = [], 0
  for span in spans:
    task.append(span)
    held += span.stop - span.start
    if held >= size:
      yield task
      task, held = [], 0
  if task:
    yield task


def _strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  strides = [itemsize]
  for size in reversed(shape[1:]):
    strides.append(strides[-1] * size)
  return tuple(reversed(strides)) if shape else ()


def _copy(
  block: Block,
  task: Sequence[Span],
  parts: Sequence[tuple[source.Index, np.ndarray]],
  fill: Any,
) -> None:
  """Fetches spans and puts each element where it belongs."""
  if block.read_into is None:
    for span in task:
      _put(block.fetch(span.start, span.stop), block, span, parts, fill)
    return
  # Fresh memory for every span would take longer than to read it.
  longest = max(span.stop - span.start for span in task)
  reused: Any = np.empty(longest, np.uint8)
  for span in task:
    data = reused[: span.stop - span.start]
    block.read_into([(span.start, memoryview(data))])
    _put(data, block, span, parts, fill)


def _put(
  data: Any,
  block: Block,
  span: Span,
  parts: Sequence[tuple[source.Index, np.ndarray]],
  fill: Any,
) -> None:
  """Puts the bytes of a span, None for the fill value, into the parts."""
  dtype = parts[0][1].dtype
  here = _moved(span.box, block.origin)
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
      strides=_strides(block.shape, dtype.itemsize),
    )
  for box, out in parts:
    common = _overlap(box, here)
    to = _moved(common, [-s.start for s in box])
    out[to] = elements[_moved(common, [-s.start for s in here])]


def _overlap(one: source.Index, other: source.Index) -> source.Index:
  """What two boxes have in common; slices without elements if nothing."""
  starts = [max(a.start, b.start) for a, b in zip(one, other, strict=True)]
  stops = [min(a.stop, b.stop) for a, b in zip(one, other, strict=True)]
  return tuple(
    slice(start, max(start, stop))
    for start, stop in zip(starts, stops, strict=True)
  )


def _moved(box: source.Index, by: Sequence[int]) -> source.Index:
  return tuple(
    slice(s.start + b, s.stop + b) for s, b in zip(box, by, strict=True)
  )
