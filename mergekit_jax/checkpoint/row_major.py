"""Where the elements of a box lie among the bytes of a row-major array."""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math

from mergekit_jax.checkpoint import source

# Bytes of one request, if it is not a single element.
REQUEST = 2**21
# Bytes between two runs that are fetched rather than asked around.
_HOLE = 2**18

# Offsets of the same bytes in two arrays, and how many they are.
Run = tuple[int, int, int]


def runs(
  shape: Sequence[int],
  box: source.Index,
  out_shape: Sequence[int],
  out_box: source.Index,
  itemsize: int,
) -> Iterator[Run]:
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

  def offsets(shape: Sequence[int], box: source.Index) -> Iterator[int]:
    along = [
      range(s.start * step, s.stop * step, step)
      for s, step in zip(box, strides(shape, itemsize), strict=True)
    ]
    begin = sum(each.start for each in along[first:])
    return map(sum, itertools.product(*along[:first], [begin]))

  length = math.prod(counts[first:]) * itemsize
  for start, to in zip(
    offsets(shape, box), offsets(out_shape, out_box), strict=True
  ):
    yield start, to, length


@dataclasses.dataclass(frozen=True)
class Span:
  """Bytes of a piece that are fetched at once, for the elements of a box.

  Attributes:
    start: offset of the first byte.
    stop: offset behind the last byte.
    box: the elements, counted from the origin of the piece.
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
  """Cuts a box of a row-major array into what one request each should bring.

  Args:
    shape: of the array.
    box: a box of it.
    itemsize: bytes of an element.
    apart: bytes of a run from which on no hole is fetched with it; None if
      there is no such length.
  """
  steps = strides(shape, itemsize)

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
    rows = max(1, REQUEST // steps[axis]) if joined else 1
    if rows >= counts[axis]:
      yield Span(start, stop, box)
      return
    for first in range(box[axis].start, box[axis].stop, rows):
      last = min(first + rows, box[axis].stop)
      yield from cut((*box[:axis], slice(first, last), *box[axis + 1 :]))

  if 0 not in source.box_shape(box):
    yield from cut(tuple(box))


def strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  strides = [itemsize]
  for size in reversed(shape[1:]):
    strides.append(strides[-1] * size)
  return tuple(reversed(strides)) if shape else ()


def overlap(one: source.Index, other: source.Index) -> source.Index:
  """What two boxes have in common; slices without elements if nothing."""
  starts = [max(a.start, b.start) for a, b in zip(one, other, strict=True)]
  stops = [min(a.stop, b.stop) for a, b in zip(one, other, strict=True)]
  return tuple(
    slice(start, max(start, stop))
    for start, stop in zip(starts, stops, strict=True)
  )


def moved(box: source.Index, by: Sequence[int]) -> source.Index:
  return tuple(
    slice(s.start + b, s.stop + b) for s, b in zip(box, by, strict=True)
  )
