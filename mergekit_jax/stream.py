"""Runs a plan: read ahead → kernel → write behind.

One thread drives. Reads and writes are futures of the checkpoint formats, so
while the devices merge one unit, the next is read and the last one written; the
order of everything else, collectives included, is the plan's.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Container, Mapping, Sequence
import concurrent.futures
import contextlib
from typing import Any
import zlib

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from mergekit_jax import drive
from mergekit_jax import plan as plans
from mergekit_jax.measure import measure
from mergekit_jax.reading import Loading, Model, read_ahead, Slot

Write = Callable[[str, Sequence[slice], np.ndarray], Any]


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
      what is to be known of it: its path, the sums of `measure`, and the
      checksums of the parts that this process wrote.
    allow_nonfinite: whether NaN and Inf may pass.
    advanced: called after every unit.

  Raises:
    FloatingPointError: if a model holds NaN or Inf and these are not allowed.
    OSError: if a model cannot be read or the output not written.
  """
  writing = _WriteBehind(write, record)
  try:
    _merge_units(
      plan, models, has_base, keys, done, writing, allow_nonfinite, advanced
    )
    writing.finish(0)
  except BaseException:
    writing.settle()
    raise


def _merge_units(
  plan: plans.Plan,
  models: Sequence[Model],
  has_base: bool,
  keys: Mapping[str, np.ndarray],
  done: Container[int],
  writing: _WriteBehind,
  allow_nonfinite: bool,
  advanced: Callable[[plans.Unit], None],
) -> None:
  """Drives every unit through its rule."""
  totals: Any = None
  answers: dict[int, list[Any]] = collections.defaultdict(list)
  for loading in read_ahead(plan, models, done):
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
    known = [] if tensor.read_once else answers[unit.group]
    reached = drive.advance(
      scope.rule, block, known, report=len(known) == scope.rounds
    )
    while tensor.read_once and reached.partials is not None:
      summed = _added(None, reached.partials, plan.mesh)
      known = [*known, _answer(scope.rule, block, summed, known)]
      reached = drive.advance(
        scope.rule, block, known, report=len(known) == scope.rounds
      )
    if reached.merged is None:
      totals = _added(totals, reached.partials, plan.mesh)
      if unit.ends_round:
        known.append(_answer(scope.rule, block, totals, known))
        totals = None
    else:
      measured = measure(block, reached.merged, reached.flags)
      sums = jax.tree.map(
        lambda x: np.asarray(x).tolist(), _everywhere(measured, plan.mesh)
      )
      if not allow_nonfinite:
        _demand_finite(loading, models, reached.merged, sums)
      writing.start(
        unit, _boxes(unit.box, reached.merged, loading.slot), {'sums': sums}
      )
      writing.finish(plans.WRITE_BEHIND)
    advanced(unit)


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

  def settle(self) -> None:
    """After an error: records what was written all the same, for a resume."""
    while self._units:
      with contextlib.suppress(Exception):
        self.finish(len(self._units) - 1)


def checksum(block: np.ndarray) -> int:
  """CRC-32 of the bytes of an array, in row-major order."""
  flat: Any = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
  return zlib.crc32(flat)


def _block(
  loading: Loading, mesh: Mesh, has_base: bool, key: np.ndarray
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
  box: plans.Box, merged: jax.Array, slot: Slot
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


def _added(totals: Any, partials: Any, mesh: Mesh) -> Any:
  """The totals so far with the partials of one more block, on the host."""
  partials = jax.tree.map(np.asarray, _everywhere(partials, mesh))
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    return drive.wide_add([partials] if totals is None else [totals, partials])


def _answer(
  rule: Any, block: drive.Block, totals: Any, known: Sequence[Any]
) -> Any:
  """An answer computed on the host, whose 64-bit types are native."""
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    return drive.answer(rule, block, totals, known)


def _everywhere(tree: Any, mesh: Mesh) -> Any:
  """Small arrays of a mesh of several processes, made readable on each."""
  if jax.process_count() == 1:
    return tree
  replicated = NamedSharding(mesh, PartitionSpec())
  with jax.enable_x64(True):
    return jax.jit(lambda tree: tree, out_shardings=replicated)(tree)


def _cast(buffer: np.ndarray, dtype: Any) -> np.ndarray:
  return buffer.astype(dtype, copy=False)


def _demand_finite(
  loading: Loading,
  models: Sequence[Model],
  merged: jax.Array,
  sums: Mapping[str, Any],
) -> None:
  """Names the model and tensor that hold NaN or Inf, if any does.

  Args:
    loading: the unit.
    models: the sources.
    merged: its merge.
    sums: from `measure`; any non-finite value shows in them.
  """
  if np.isfinite([sums['merged'], *sums['experts']]).all():
    return
  path = loading.unit.tensor.path
  where = f'the box at {loading.unit.box.origin}'
  for model, buffers in zip(models, loading.buffers, strict=True):
    if bad := sum(map(_count_nonfinite, buffers)):
      raise FloatingPointError(
        f'{model.name}: {model.paths[path]} in {model.checkpoint.path} holds '
        f'{bad} non-finite values (NaN or Inf) in {where}. Repair the '
        'checkpoint, leave it out, or pass allow_nonfinite=True '
        '(--allow_nonfinite) to let them through.'
      )
  blocks = [np.asarray(shard.data) for shard in merged.addressable_shards]
  if bad := sum(map(_count_nonfinite, blocks)):
    raise FloatingPointError(
      f'{path}: merging finite models gave {bad} non-finite values in '
      f'{where}: {merged.dtype} overflows. Use a smaller scale, a dtype with '
      'more range, or pass allow_nonfinite=True (--allow_nonfinite).'
    )


def _count_nonfinite(block: np.ndarray) -> int:
  return int(np.sum(~np.isfinite(block.astype(np.float64))))
