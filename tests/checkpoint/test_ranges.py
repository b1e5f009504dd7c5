"""Which bytes are asked for when a box of an array is read."""

import itertools
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from mergekit_jax.checkpoint import ranges, row_major

SHAPE = (3, 5, 4, 6)


def boxes():
  """Boxes of many kinds: whole, rows, columns, corners, single elements."""
  per_axis = [
    [slice(0, size), slice(1, 2), slice(1, size - 1)] for size in SHAPE
  ]
  yield from itertools.product(*per_axis)


class Objects:
  """An array cut into row-major pieces; notes what is asked for."""

  def __init__(self, array, cuts, lacking=()):
    self.array = array
    self.asked = []
    self._pieces = []
    along_axes = [
      np.split(np.arange(n), c) for n, c in zip(array.shape, cuts, strict=True)
    ]
    for number, indices in enumerate(itertools.product(*along_axes)):
      part = array[np.ix_(*indices)] if indices else array
      self._pieces.append(
        ranges.Piece(
          tuple(int(along[0]) for along in indices),
          part.shape,
          self._fetch(None if number in lacking else part.tobytes()),
        )
      )

  def _fetch(self, data):
    def fetch(start, stop):
      self.asked.append(stop - start)
      assert 0 <= start < stop and (data is None or stop <= len(data))
      return data and data[start:stop]

    return fetch

  def pieces(self, box):
    """Only those that the box touches."""
    for piece in self._pieces:
      if all(
        s.start < o + n and o < s.stop
        for s, o, n in zip(box, piece.origin, piece.shape, strict=True)
      ):
        yield piece


@pytest.fixture(scope='module')
def array():
  return np.arange(np.prod(SHAPE)).astype(jnp.bfloat16).reshape(SHAPE)


@pytest.mark.parametrize('size, hole', [(2**21, 2**18), (40, 7), (1, 0)])
def test_every_element_comes_from_its_place(monkeypatch, array, size, hole):
  monkeypatch.setattr(row_major, 'REQUEST', size)
  monkeypatch.setattr(row_major, '_HOLE', hole)
  reader = ranges.Reader()
  objects = Objects(array, [[2], [], [1, 3], [4]])
  for box in boxes():
    out = np.zeros([s.stop - s.start for s in box], array.dtype)
    reader.read(objects.pieces, [(box, out)]).result()
    np.testing.assert_array_equal(out, array[box])


def spans(shape, box, itemsize=4):
  return [(s.start, s.stop) for s in row_major.spans(shape, box, itemsize)]


def test_a_run_of_rows_is_one_request():
  box = slice(10, 30), slice(0, 50)
  assert spans((100, 50), box) == [(10 * 200, 30 * 200)]
  box = slice(2, 3), slice(10, 30), slice(0, 50)
  assert spans((4, 100, 50), box) == [(2 * 20_000 + 2000, 2 * 20_000 + 6000)]


def test_a_long_run_is_fetched_in_several_requests():
  found = spans((2**10, 2**10), (slice(0, 2**10), slice(0, 2**10)))
  assert found == [(0, 2**21), (2**21, 2**22)]
  # Rows that are longer than a request are cut themselves.
  row = spans((2, 2**20), (slice(1, 2), slice(0, 2**20)))
  assert row == [(2**22, 2**22 + 2**21), (2**22 + 2**21, 2**23)]


def test_short_holes_are_fetched_and_long_ones_are_not():
  columns = slice(10, 20)
  assert spans((3, 100), (slice(0, 3), columns)) == [(40, 880)]
  long = 2**18
  assert spans((3, long), (slice(0, 3), columns)) == [
    (4 * (row * long + 10), 4 * (row * long + 20)) for row in range(3)
  ]


def test_long_runs_of_local_files_are_read_without_holes():
  def apart(columns):
    box = slice(0, 3), slice(0, columns)
    found = row_major.spans((3, 2**13), box, 4, apart=2**14)
    return [(s.start, s.stop) for s in found]

  rows = [(row * 2**15, row * 2**15 + 2**14) for row in range(3)]
  assert apart(2**12) == rows
  assert apart(2**12 - 1) == [(0, 2 * 2**15 + 2**14 - 4)]
  assert apart(2**13) == [(0, 3 * 2**15)]


def test_scalars_and_boxes_without_elements():
  assert spans((), ()) == [(0, 4)]
  assert spans((3, 4), (slice(1, 1), slice(0, 4))) == []
  out = np.zeros((), np.float32)
  objects = Objects(np.asarray(2.5, np.float32), [])
  ranges.Reader().read(objects.pieces, [((), out)]).result()
  assert out == 2.5


def test_columns_on_several_devices_are_fetched_once(array):
  objects = Objects(array, [[], [], [], []])
  box = (slice(0, 3), slice(1, 5), slice(0, 4))
  parts = [((*box, slice(i, i + 2)), i) for i in (0, 2, 4)]
  outs = [(part, np.zeros((3, 4, 4, 2), array.dtype)) for part, _ in parts]
  ranges.Reader().read(objects.pieces, outs).result()
  for (_, i), (_, out) in zip(parts, outs, strict=True):
    np.testing.assert_array_equal(out, array[:, 1:, :, i : i + 2])
  # From the first element to the last one, with the holes in between.
  assert objects.asked == [array.nbytes - array[0, 0].nbytes]
  # Parts with others between them are fetched each for itself.
  objects.asked.clear()
  ranges.Reader().read(objects.pieces, [outs[0], outs[2]]).result()
  assert len(objects.asked) == 2


@pytest.mark.parametrize('axis, in_place', [(0, True), (1, True), (3, False)])
def test_long_runs_of_a_local_file_are_read_to_their_places(axis, in_place):
  """Of two devices, whose parts are runs of 2**18, 2**16 or 16 bytes."""
  array = np.arange(2**17, dtype=np.float32).reshape(4, 4, -1, 8)
  data = memoryview(array.tobytes())
  filled = []

  def read_into(runs):
    for start, out in runs:
      out[:] = data[start : start + len(out)]
      filled.append((np.frombuffer(out, np.uint8), len(out)))

  piece = ranges.Piece((0,) * 4, array.shape, read_into=read_into)
  outs = []
  half = array.shape[axis] // 2
  for start in (0, half):
    box = [slice(0, size) for size in array.shape]
    box[axis] = slice(start, start + half)
    wanted = array[tuple(box)]
    outs.append((tuple(box), np.zeros(wanted.shape, array.dtype), wanted))
  ranges.Reader(local=True).read(
    lambda _: [piece], [(box, out) for box, out, _ in outs]
  ).result()
  for _, out, wanted in outs:
    np.testing.assert_array_equal(out, wanted)
  assert sum(size for _, size in filled) == array.nbytes
  for buffer, _ in filled:
    shared = any(np.may_share_memory(buffer, out) for _, out, _ in outs)
    assert shared == in_place


def test_long_runs_are_cut_into_tasks(monkeypatch):
  """Each with the place that its bytes go to."""
  monkeypatch.setattr(ranges, '_TASK', 8)
  assert [*ranges._tasks([(0, 50, 20), (30, 90, 5)])] == [
    [(0, 50, 8)],
    [(8, 58, 8)],
    [(16, 66, 4), (30, 90, 5)],
  ]
  assert [*ranges._tasks([(0, 0, 3)])] == [[(0, 0, 3)]]


def test_runs_end_where_either_array_is_not_whole():
  wide = slice(0, 2), slice(1, 4)
  whole = slice(0, 2), slice(0, 3)
  # Rows of 3 float32 among rows of 5, out of them and into them.
  out_of = row_major.runs((2, 5), wide, (2, 3), whole, 4)
  into = row_major.runs((2, 3), whole, (2, 5), wide, 4)
  assert [*out_of] == [(4, 0, 12), (24, 12, 12)]
  assert [*into] == [(0, 4, 12), (12, 24, 12)]
  assert [*row_major.runs((2, 3), whole, (2, 3), whole, 4)] == [(0, 0, 24)]
  nothing = slice(0, 2), slice(1, 1)
  assert not [*row_major.runs((2, 3), nothing, (2, 0), nothing, 4)]


def test_boxes_apart_have_nothing_in_common():
  one, other = (slice(0, 2), slice(0, 9)), (slice(5, 9), slice(3, 4))
  for pair in (one, other), (other, one):
    assert row_major.overlap(*pair) == (slice(5, 5), slice(3, 4))


def test_halves_of_long_rows_of_a_local_file_are_read_alone():
  """2**14 bytes each: long enough to leave out what another host reads."""
  array = np.arange(3 * 2**13, dtype=np.float32).reshape(3, -1)
  data, asked = memoryview(array.tobytes()), []

  def read_into(runs):
    for start, out in runs:
      asked.append(len(out))
      out[:] = data[start : start + len(out)]

  piece = ranges.Piece((0, 0), array.shape, read_into=read_into)
  box = slice(0, 3), slice(2**12, 2**13)
  out = np.zeros((3, 2**12), np.float32)
  ranges.Reader(local=True).read(lambda _: [piece], [(box, out)]).result()
  np.testing.assert_array_equal(out, array[box])
  assert asked == [2**14] * 3


def test_a_piece_has_one_way_to_be_read():
  for ways in {}, {'fetch': print, 'read_into': print}:
    with pytest.raises(ValueError, match='by fetch or by read_into'):
      ranges.Piece((0,), (3,), **ways)


def test_what_is_not_stored_is_the_fill_value(array):
  objects = Objects(array, [[1], [], [], []], lacking=[0])
  out = np.zeros(SHAPE, array.dtype)
  everything = tuple(slice(0, size) for size in SHAPE)
  ranges.Reader().read(objects.pieces, [(everything, out)], 7).result()
  assert (out[0] == 7).all()
  np.testing.assert_array_equal(out[1:], array[1:])


def test_memory_is_bounded(monkeypatch):
  """What is held at once is no more than what the plan counts."""
  monkeypatch.setattr(row_major, 'REQUEST', 1000)
  array = np.zeros(100_000, np.uint8)
  lock = threading.Lock()
  held, most = 0, 0

  def fetch(start, stop):
    nonlocal held, most
    with lock:
      held += stop - start
      most = max(most, held)
    time.sleep(0.002)
    with lock:
      held -= stop - start
    return bytes(stop - start)

  piece = ranges.Piece((0,), array.shape, fetch)
  box = (slice(0, array.size),)
  ranges.Reader().read(lambda _: [piece], [(box, array)]).result()
  # TensorStore holds what it hands over twice.
  assert 2000 < 2 * most <= ranges.fetching_bytes(array.nbytes) <= 40_000
  assert ranges.fetching_bytes(10) <= 400


def test_an_error_comes_after_all_reads_have_ended(array):
  ended = []

  def fetch(start, stop):
    if start:
      ended.append(start)
      return array.tobytes()[start:stop]
    raise OSError('no such object')

  def pieces(box):
    yield ranges.Piece((0,) * 4, SHAPE, fetch)

  out = np.zeros(SHAPE, array.dtype)
  box = tuple(slice(0, size) for size in SHAPE)
  parts = [((slice(i, i + 1), *box[1:]), out[i : i + 1]) for i in (0, 2)]
  with pytest.raises(OSError, match='no such object'):
    ranges.Reader().read(pieces, parts).result()
  assert len(ended) == 1 and (out[2] == array[2]).all()
