"""Reads boxes of all models ahead of the merge, into reused buffers."""

from __future__ import annotations

import collections
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from mergekit_jax.checkpoint import Checkpoint
from mergekit_jax.driving.block import bits_dtype
from mergekit_jax.planning import plan as plans

# What TensorStore says of files that may be as they were written.
_OUT_OF_REACH = ('PERMISSION_DENIED', 'RESOURCE_EXHAUSTED', 'UNAVAILABLE')
_ALIGNMENT = 64  # bytes; what lets a CPU device use a numpy buffer in place


@dataclasses.dataclass(frozen=True)
class Model:
  """A checkpoint to read, and where its leaves lie.

  Attributes:
    name: what to call it in errors.
    checkpoint: the opened checkpoint.
    paths: the path in the checkpoint of every leaf, by that in the output.
  """

  name: str
  checkpoint: Checkpoint
  paths: Mapping[str, str]

  def read_parts(
    self, path: str, parts: Sequence[tuple[Sequence[slice], np.ndarray]]
  ) -> Callable[[], None]:
    """Starts to read boxes into buffers; calling the result waits for it."""
    future = self.checkpoint.read_parts(self.paths[path], parts)

    def wait() -> None:
      try:
        future.result()
      except Exception as error:  # TensorStore's are of every class
        advice = ' Restore the checkpoint from a copy.'
        raise OSError(
          f'{self.name}: {self.paths[path]} in {self.checkpoint.path} could '
          f'not be read ({error}).{advice if _is_of_damage(error) else ""}'
        ) from error

    return wait


def _is_of_damage(error: Exception) -> bool:
  """Whether data are lost or changed; they may be only out of reach."""
  if isinstance(error, OSError):
    return isinstance(error, FileNotFoundError)
  return not str(error).startswith(_OUT_OF_REACH)


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


class Slot:
  """Memory for one unit, reused: fresh memory is many times slower."""

  def __init__(self):
    self._memory = np.empty(0, np.uint8)

  def buffers(
    self, wanted: Sequence[tuple[tuple[int, ...], Any]]
  ) -> list[np.ndarray]:
    """Aligned arrays of these shapes and dtypes; earlier ones are void."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    steps = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    if self._memory.nbytes < sum(steps):
      memory = np.empty(sum(steps) + _ALIGNMENT, np.uint8)
      offset = -memory.ctypes.data % _ALIGNMENT
      self._memory = memory[offset : offset + sum(steps)]
    starts = itertools.accumulate(steps, initial=0)
    return [
      self._memory[start : start + size].view(dtype).reshape(shape)
      for start, size, (shape, dtype) in zip(
        starts, sizes, wanted, strict=False
      )
    ]

  def holds(self, array: np.ndarray) -> bool:
    return np.may_share_memory(array, self._memory)


@dataclasses.dataclass
class Loading:
  """A unit whose reads are under way."""

  unit: plans.Unit
  slot: Slot
  parts: list[Part]
  buffers: list[list[np.ndarray]]
  waits: list[Callable[[], None]]

  def wait(self) -> None:
    for wait in self.waits:
      wait()

  def array(
    self, model: int, placed: NamedSharding, shape: tuple[int, ...]
  ) -> jax.Array:
    """The box of one model, as bits, on the mesh; on CPUs without a copy.

    Args:
      model: its number.
      placed: how the array is spread, which is how the box is.
      shape: of the array; the box in row-major order.
    """
    held = bits_dtype(self.unit.tensor.sources[model])
    shape_of_part = placed.shard_shape(shape)
    index_of = placed.addressable_devices_indices_map(shape)
    buffers = {
      _starts(index_of[device]): buffer.view(held).reshape(shape_of_part)
      for part, buffer in zip(self.parts, self.buffers[model], strict=True)
      for device in part.devices
    }
    # One call for all devices: one for each takes several times as long.
    return jax.make_array_from_callback(
      shape, placed, lambda index: buffers[_starts(index)]
    )

  def part_of(self, device: Any) -> Part:
    """What a local device holds of the box."""
    return next(part for part in self.parts if device in part.devices)


def _starts(index: Any) -> tuple[int, ...]:
  return tuple(s.start or 0 for s in index)


def read_ahead(
  plan: plans.Plan, models: Sequence[Model], done: Container[int]
) -> Iterator[Loading]:
  """The units in order, each read, the next ones being read meanwhile."""
  slots = [Slot() for _ in range(1 + plans.READ_AHEAD)]
  ahead: collections.deque[Loading] = collections.deque()
  for number, unit in enumerate(plan.units(done)):
    ahead.append(_load(unit, slots[number % len(slots)], plan.mesh, models))
    if len(ahead) == len(slots):
      ahead[0].wait()
      yield ahead.popleft()
  while ahead:
    ahead[0].wait()
    yield ahead.popleft()


def _load(
  unit: plans.Unit, slot: Slot, mesh: Mesh, models: Sequence[Model]
) -> Loading:
  """Starts to read a box of every model that the unit needs."""
  parts = local_parts(unit.box, mesh)
  dtypes = unit.tensor.sources
  memory = iter(slot.buffers([(p.shape, d) for d in dtypes for p in parts]))
  buffers = [[next(memory) for _ in parts] for _ in dtypes]
  waits = [
    model.read_parts(
      unit.tensor.path,
      [(part.index, buffer) for part, buffer in zip(parts, own, strict=True)],
    )
    for model, own in zip(models, buffers, strict=False)
  ]
  return Loading(unit, slot, parts, buffers, waits)


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
