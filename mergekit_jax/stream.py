"""Runs a plan: read ahead → kernel → write behind.

One thread drives. Reads and writes are futures of the checkpoint formats, so
while the devices merge one unit, the next is read and the last one written; the
order of everything else, collectives included, is the plan's.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
from typing import Any
import zlib

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from mergekit_jax import drive
from mergekit_jax import plan as plans
from mergekit_jax.checkpoint import Checkpoint

_ALIGNMENT = 64  # bytes; what lets a CPU device use a numpy buffer in place

Write = Callable[[str, Sequence[slice], np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Model:
  """A checkpoint to read, and where its parameters begin.

  Attributes:
    name: what to call it in errors.
    checkpoint: the opened checkpoint.
    paths: the full path of every leaf by its path below the root.
  """

  name: str
  checkpoint: Checkpoint
  paths: Mapping[str, str]

  def read_into(
    self, path: str, index: Sequence[slice], out: np.ndarray
  ) -> Callable[[], None]:
    """Starts a read; calling the result waits for it."""
    future = self.checkpoint.read_into(self.paths[path], index, out)

    def wait() -> None:
      try:
        future.result()
      except Exception as error:
        raise OSError(
          f'{self.name}: {self.paths[path]} in {self.checkpoint.path} could '
          f'not be read ({error}). Restore the checkpoint from a copy.'
        ) from error

    return wait


@dataclasses.dataclass(frozen=True)
class Part:
  """What one or more local devices hold of a box.

  Attributes:
    index: where it lies in the tensor.
    devices: the local devices that hold it.
    is_first: whether the first device of the mesh that holds it is local: the
      process to which that device belongs writes it.
  """

  index: tuple[slice, ...]
  devices: tuple[Any, ...]
  is_first: bool

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in self.index)


class _Slot:
  """Buffers for one unit, reused: fresh memory is many times slower."""

  def __init__(self):
    self._buffers: dict[tuple[int, int], np.ndarray] = {}

  def buffer(
    self, model: int, part: int, shape: tuple[int, ...], dtype: Any
  ) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = self._buffers.get((model, part))
    if raw is None or raw.nbytes < size:
      raw = np.empty(size + _ALIGNMENT, np.uint8)
      offset = -raw.ctypes.data % _ALIGNMENT
      raw = self._buffers[model, part] = raw[offset : offset + size]
    return raw[:size].view(dtype).reshape(shape)

  def holds(self, array: np.ndarray) -> bool:
    return any(
      np.may_share_memory(array, buffer) for buffer in self._buffers.values()
    )


@dataclasses.dataclass
class _Loading:
  """A unit whose reads are under way."""

  unit: plans.Unit
  slot: _Slot
  parts: list[Part]
  buffers: list[list[np.ndarray]]
  waits: list[Callable[[], None]]

  def wait(self) -> None:
    for wait in self.waits:
      wait()


def run(
  plan: plans.Plan,
  models: Sequence[Model],
  *,
  has_base: bool,
  keys: Mapping[str, np.ndarray],
  done: Container[int],
  write: Write,
  record: Callable[[int, dict[str, Any]], None],
  allow_nonfinite: bool,
  advanced: Callable[[plans.Unit], None],
) -> None:
  """Merges every unit of a plan.

  Args:
    plan: the plan.
    models: the sources, the base first if there is one.
    has_base: whether there is one.
    keys: the random key of every merged leaf, uint32 `[2]`.
    done: numbers of units that are written already.
    write: `write(path, index, block)` starts to write a box of the output and
      returns a future.
    record: called with the number of every unit once it is written, and with
      what is to be known of it: its path, the sums of `drive.measure`, and the
      checksums of the parts that this process wrote.
    allow_nonfinite: whether NaN and Inf may pass.
    advanced: called after every unit.

  Raises:
    FloatingPointError: if a model holds NaN or Inf and these are not allowed.
    OSError: if a model cannot be read or the output not written.
  """
  totals: list[Any] = [None] * len(plan.scopes)
  answers: list[list[Any]] = [[] for _ in plan.scopes]
  writing = _WriteBehind(write, record)
  for loading in _read_ahead(plan, models, done):
    unit, tensor = loading.unit, loading.unit.tensor
    scope = plan.scopes[unit.scope]
    if scope.rule is None:
      parts = zip(loading.parts, loading.buffers[0], strict=True)
      writing.start(
        unit,
        [(p.index, _cast(b, tensor.dtype)) for p, b in parts if p.is_first],
      )
      writing.finish(0)  # before the buffers are read into again
      advanced(unit)
      continue
    block = _block(loading, plan.mesh, has_base, keys[tensor.path])
    known = [] if tensor.read_once else answers[unit.scope]
    reached = drive.advance(
      scope.rule, block, known, report=len(known) == scope.rounds
    )
    while tensor.read_once and reached.partials is not None:
      summed = drive.wide_add([_everywhere(reached.partials, plan.mesh)])
      known = [*known, drive.answer(scope.rule, block, summed, known)]
      reached = drive.advance(
        scope.rule, block, known, report=len(known) == scope.rounds
      )
    if reached.merged is None:
      partials = _everywhere(reached.partials, plan.mesh)
      totals[unit.scope] = _add(totals[unit.scope], partials)
      if unit.ends_round:
        summed = totals[unit.scope]
        known.append(drive.answer(scope.rule, block, summed, known))
        totals[unit.scope] = None
    else:
      measured = drive.measure(block, reached.merged, reached.flags)
      sums = jax.tree.map(
        lambda x: np.asarray(x).tolist(), _everywhere(measured, plan.mesh)
      )
      if not allow_nonfinite:
        _demand_finite(loading, models, sums['experts'])
      writing.start(
        unit, _boxes(unit.box, reached.merged, loading.slot), {'sums': sums}
      )
      writing.finish(plans.WRITE_BEHIND)
    advanced(unit)
  writing.finish(0)


class _WriteBehind:
  """Writes that are under way, and what is recorded when they are done."""

  def __init__(
    self, write: Write, record: Callable[[int, dict[str, Any]], None]
  ):
    self._write = write
    self._record = record
    self._units: collections.deque[Any] = collections.deque()
    self._checksums = concurrent.futures.ThreadPoolExecutor(1)

  def start(
    self,
    unit: plans.Unit,
    boxes: Sequence[tuple[tuple[slice, ...], np.ndarray]],
    facts: Mapping[str, Any] | None = None,
  ) -> None:
    """Starts to write the parts of a unit."""
    path = unit.tensor.path
    parts = [
      (
        self._write(path, index, block),
        self._checksums.submit(checksum, block),
        [s.start for s in index],
        block.shape,
      )
      for index, block in boxes
    ]
    self._units.append((unit.number, {'path': path, **(facts or {})}, parts))

  def finish(self, behind: int) -> None:
    """Waits until no more than `behind` units are being written."""
    while len(self._units) > behind:
      number, facts, parts = self._units.popleft()
      written = []
      for future, digest, origin, shape in parts:
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


def _read_ahead(
  plan: plans.Plan, models: Sequence[Model], done: Container[int]
) -> Iterator[_Loading]:
  """The units in order, each read, the next ones being read meanwhile."""
  slots = [_Slot() for _ in range(1 + plans.READ_AHEAD)]
  ahead: collections.deque[_Loading] = collections.deque()
  for number, unit in enumerate(plan.units(done)):
    ahead.append(_load(unit, slots[number % len(slots)], plan.mesh, models))
    if len(ahead) == len(slots):
      ahead[0].wait()
      yield ahead.popleft()
  while ahead:
    ahead[0].wait()
    yield ahead.popleft()


def _load(
  unit: plans.Unit, slot: _Slot, mesh: Mesh, models: Sequence[Model]
) -> _Loading:
  """Starts to read a box of every model that the unit needs."""
  parts = local_parts(unit.box, mesh)
  buffers, waits = [], []
  for i, dtype in enumerate(unit.tensor.sources):
    buffers.append(
      [slot.buffer(i, j, part.shape, dtype) for j, part in enumerate(parts)]
    )
    for part, buffer in zip(parts, buffers[-1], strict=True):
      waits.append(models[i].read_into(unit.tensor.path, part.index, buffer))
  return _Loading(unit, slot, parts, buffers, waits)


def part_shape(box: plans.Box, mesh: Mesh) -> tuple[int, ...]:
  """The shape of what one device holds of a box."""
  return NamedSharding(mesh, box.spec).shard_shape(box.shape)


def local_parts(box: plans.Box, mesh: Mesh) -> list[Part]:
  """The parts of a box on this process's devices, replicas together."""
  sharding = NamedSharding(mesh, box.spec)
  holders = collections.defaultdict(list)
  everywhere: Any = sharding.devices_indices_map(box.shape)
  for device in mesh.devices.flat:
    index = everywhere[device]
    bounds = [s.indices(n)[:2] for s, n in zip(index, box.shape, strict=True)]
    holders[tuple(bounds)].append(device)
  here = jax.process_index()
  parts = []
  for bounds, devices in holders.items():
    local = tuple(d for d in devices if d.process_index == here)
    index = tuple(
      slice(origin + start, origin + stop)
      for origin, (start, stop) in zip(box.origin, bounds, strict=True)
    )
    if local:
      parts.append(Part(index, local, devices[0] in local))
  return parts


def _block(
  loading: _Loading, mesh: Mesh, has_base: bool, key: np.ndarray
) -> drive.Block:
  """The unit as arrays on the mesh; on CPU devices, without a copy."""
  unit = loading.unit
  sharding = NamedSharding(mesh, unit.box.spec)
  arrays = [
    jax.make_array_from_single_device_arrays(
      unit.box.shape,
      sharding,
      [
        jax.device_put(buffer, device)
        for part, buffer in zip(loading.parts, buffers, strict=True)
        for device in part.devices
      ],
    )
    for buffers in loading.buffers
  ]
  return drive.Block(
    base=arrays[0] if has_base else None,
    experts=arrays[1:] if has_base else arrays,
    key=key,
    origin=tuple(np.int32(start) for start in unit.box.origin),
    whole=unit.tensor.shape,
    stacked=unit.tensor.stacked,
    dtype=unit.tensor.dtype,
  )


def _boxes(
  box: plans.Box, merged: jax.Array, slot: _Slot
) -> list[tuple[tuple[slice, ...], np.ndarray]]:
  """The parts of a merged box that this process writes."""
  boxes = []
  for shard in merged.addressable_shards:
    if shard.replica_id:
      continue
    block = np.asarray(shard.data)
    # XLA may hand an input on as the output, and the input's buffer is reused.
    block = block.copy() if slot.holds(block) else block
    index = tuple(
      slice(origin + (s.start or 0), origin + (s.start or 0) + size)
      for origin, s, size in zip(
        box.origin, shard.index, block.shape, strict=True
      )
    )
    boxes.append((index, block))
  return boxes


def _everywhere(tree: Any, mesh: Mesh) -> Any:
  """Small arrays of a mesh of several processes, made readable on each."""
  if jax.process_count() == 1:
    return tree
  replicated = NamedSharding(mesh, PartitionSpec())
  with jax.enable_x64(True):
    return jax.jit(lambda tree: tree, out_shardings=replicated)(tree)


def _add(total: Any, partials: Any) -> Any:
  """Adds partial sums on the host, in int64 and float64."""
  wide = {'i': np.int64, 'f': np.float64}
  partials = jax.tree.map(
    lambda x: np.asarray(x).astype(wide[x.dtype.kind]), partials
  )
  if total is None:
    return partials
  return jax.tree.map(np.add, total, partials)


def _cast(buffer: np.ndarray, dtype: Any) -> np.ndarray:
  return buffer.astype(dtype, copy=False)


def _demand_finite(
  loading: _Loading, models: Sequence[Model], squares: Sequence[float]
) -> None:
  """Names the model and tensor that hold NaN or Inf, if any does.

  Args:
    loading: the unit.
    models: the sources.
    squares: sums of squares in which any non-finite value shows.
  """
  if np.isfinite(squares).all():
    return
  path = loading.unit.tensor.path
  for model, buffers in zip(models, loading.buffers, strict=True):
    bad = sum(
      int(np.sum(~np.isfinite(buffer.astype(np.float32)))) for buffer in buffers
    )
    if bad:
      raise FloatingPointError(
        f'{model.name}: {model.paths[path]} in {model.checkpoint.path} holds '
        f'{bad} non-finite values (NaN or Inf) in the box at '
        f'{loading.unit.box.origin}. Repair the checkpoint, leave it out, or '
        'pass allow_nonfinite=True to let them through.'
      )
