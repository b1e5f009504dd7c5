"""Where merged boxes go: into a checkpoint, behind the merge."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping, Sequence
import concurrent.futures
import contextlib
from typing import Any
import zlib

import jax
import numpy as np

from mergekit_jax.checkpoint.writer import Write
from mergekit_jax.planning import plan as plans
from mergekit_jax.streaming.reading import Loading

_Part = tuple[tuple[slice, ...], np.ndarray]


class CheckpointSink:
  """Writes boxes into a checkpoint while the merge goes on (`stream.Sink`)."""

  def __init__(
    self,
    keys: Mapping[str, np.ndarray],
    done: Collection[int],
    write: Write,
    record: Callable[[int, dict[str, Any]], None],
    behind: int = plans.WRITE_BEHIND,
  ):
    """See `stream.Sink`.

    Args:
      keys: the random key of every merged leaf.
      done: numbers of units that are written already.
      write: `write(path, index, block)` starts to write a box and returns a
        future.
      record: called with the number of every unit once it is written, and with
        what is to be known of it: its path, its facts, and the checksums of the
        parts that this process wrote.
      behind: how many units may be being written while one is merged.
    """
    self.keys = keys
    self.done = done
    self._write = write
    self._record = record
    self._behind = behind
    self._units: collections.deque[Any] = collections.deque()
    self._checksums = concurrent.futures.ThreadPoolExecutor(1)

  def take(
    self, loading: Loading, merged: jax.Array, facts: Mapping[str, Any]
  ) -> None:
    self._start(loading.unit, _parts(loading, merged), facts)
    self._wait(self._behind)

  def copy(self, loading: Loading) -> None:
    parts = zip(loading.parts, loading.buffers[0], strict=True)
    self._start(
      loading.unit,
      [(p.index, b) for p, b in parts if p.is_first],
      {},
    )
    self._wait(0)  # before the buffers are read into again

  def finish(self) -> None:
    self._wait(0)
    self._checksums.shutdown()

  def settle(self) -> None:
    while self._units:
      with contextlib.suppress(Exception):
        self._wait(len(self._units) - 1)
    self._checksums.shutdown()

  def _start(
    self, unit: plans.Unit, parts: Sequence[_Part], facts: Mapping[str, Any]
  ) -> None:
    path = unit.tensor.path
    writes = [
      (
        self._write(path, index, block),
        self._checksums.submit(checksum, block),
        [s.start for s in index],
        block.shape,
      )
      for index, block in parts
    ]
    self._units.append((unit.number, {'path': path, **facts}, writes))

  def _wait(self, behind: int) -> None:
    """Waits until no more than `behind` units are being written."""
    while len(self._units) > behind:
      number, facts, writes = self._units.popleft()
      written = []
      for future, digest, origin, shape in writes:
        try:
          future.result()
        except Exception as error:
          raise OSError(
            f'{facts["path"]} could not be written: {error}'
          ) from error
        written.append([origin, list(shape), digest.result()])
      self._record(number, {**facts, 'parts': written})


def checksum(block: np.ndarray) -> int:
  """CRC-32 of the bytes of an array, in row-major order."""
  flat: Any = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
  return zlib.crc32(flat)


def _parts(loading: Loading, merged: jax.Array) -> list[_Part]:
  """The parts of a merged box that this process writes."""
  parts = []
  for shard in merged.addressable_shards:
    if shard.replica_id:
      continue
    part = loading.part_of(shard.device)
    block = np.asarray(shard.data).view(loading.unit.tensor.dtype)
    # XLA may hand an input on as the output, and the input's buffer is reused.
    block = block.copy() if loading.slot.holds(block) else block
    parts.append((part.index, block.reshape(part.shape)))
  return parts
