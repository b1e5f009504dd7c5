"""What a checkpoint is to the rest of the library: named arrays, read by box.

A format implements `_start_read`, `storage`, `files` and `fingerprint`;
everything else is the same for all of them.
"""

import abc
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
from typing import Any, ClassVar, Protocol

from etils import epath
import jax
import numpy as np

from mergekit_jax import checks
from mergekit_jax.checkpoint import contents, remote

Index = tuple[slice, ...]


class Future(Protocol):
  """A read or write under way; `result()` waits and raises what went wrong."""

  def result(self) -> Any: ...


class Joined:
  """Several reads as one; after `result` none of them is under way."""

  def __init__(self, futures: Iterable[Future]):
    self._futures = list(futures)

  def result(self) -> None:
    errors = []
    for future in self._futures:
      try:
        future.result()
      except Exception as error:
        errors.append(error)
    if errors:
      raise errors[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
  """How an array lies on disk.

  Attributes:
    chunk: shape of the boxes in which the array is stored.
    compressed: whether reading a part of a chunk means reading all of it,
      because it must be decoded.
  """

  chunk: tuple[int, ...]
  compressed: bool


@dataclasses.dataclass(frozen=True)
class OrbaxLayout:
  """Where the item lies in an Orbax checkpoint, and how its arrays are stored.

  Attributes:
    item: the item directory relative to the top of the checkpoint: '' for a
      flat save, '<step>/<item>' for a CheckpointManager, 'state' or another
      item name for the v1 API.
    use_ocdbt: arrays share an OCDBT store; else each has its own directory.
    use_zarr3: arrays are zarr v3; else zarr v2.
    random_keys: {path: implementation} of arrays that are JAX random keys.
    shardings: {path: sharding} as Orbax writes them down, with which arrays are
      restored where nobody says another.
  """

  item: str = ''
  use_ocdbt: bool = True
  use_zarr3: bool = False
  random_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Nothing about how arrays lie: two layouts may be alike without.
  shardings: Mapping[str, str] = dataclasses.field(
    default_factory=dict, compare=False
  )


class Checkpoint(abc.ABC):
  """The arrays of one checkpoint, opened for reading only.

  Attributes:
    path: the path the user gave.
    format: 'orbax' or 'safetensors'.
    specs: shape and stored dtype of every array leaf by its path, the keys
      joined by '/'.
    tree: the leaves in their native nesting. An array leaf is its own path;
      None, empty containers and strings are kept as they are, so a leaf is an
      array exactly when the keys leading to it, joined, are in `specs`.
    metadata: the custom metadata saved with the checkpoint.
    layout: how to write a checkpoint that lies like this one; None where the
      format is not Orbax.
  """

  format: ClassVar[str]

  def __init__(
    self,
    path: epath.Path,
    *,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    tree: Any,
    metadata: Mapping[str, Any],
    layout: OrbaxLayout | None = None,
  ):
    self.path = path
    self.specs = dict(specs)
    self.tree = tree
    self.metadata = dict(metadata)
    self.layout = layout

  def __repr__(self) -> str:
    leaves = f'{len(self.specs)} leaves'
    return f'<{self.format} checkpoint at {self.location}, {leaves}>'

  @property
  def items_beside(self) -> list[str]:
    """What of the path given was not chosen: the names of other trees."""
    return []

  @property
  def location(self) -> epath.Path:
    """The path of what is read: of several steps or items one was chosen."""
    return self.path

  def read(
    self,
    path: str,
    sharding: jax.sharding.Sharding | None = None,
    index: Sequence[slice] | None = None,
  ) -> jax.Array:
    """Reads an array, or a box of it; each process reads only its own part.

    Args:
      path: a key of `specs`.
      sharding: sharding of the result; the first local device if None.
      index: one slice of step 1 per dimension; the whole array if None.

    Returns:
      The array in the stored dtype, also where jax would narrow it (int64).

    Raises:
      ValueError: unknown path, or an index that does not fit the array.
    """
    spec = self._spec(path)
    outer = resolve_index(index, spec.shape, path)
    shape = box_shape(outer)
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    # Replicas share one read.
    parts = {}
    for inner in sharding.addressable_devices_indices_map(shape).values():
      box = resolve_index(inner, shape, path)
      if _bounds(box) not in parts:
        moved = tuple(
          slice(o.start + i.start, o.start + i.stop)
          for o, i in zip(outer, box, strict=True)
        )
        out = np.empty(box_shape(box), spec.dtype)
        parts[_bounds(box)] = moved, out
    self.read_parts(path, list(parts.values())).result()

    def part(inner: Index | None) -> np.ndarray:
      return parts[_bounds(resolve_index(inner, shape, path))][1]

    with jax.enable_x64(True):
      return jax.make_array_from_callback(shape, sharding, part)

  def read_into(
    self, path: str, index: Sequence[slice] | None, out: np.ndarray
  ) -> Future:
    """Starts to read box `index` of an array into `out`; see `read_parts`."""
    return self.read_parts(path, [(index, out)])

  def read_parts(
    self,
    path: str,
    parts: Sequence[tuple[Sequence[slice] | None, np.ndarray]],
  ) -> Future:
    """Starts to read boxes of an array, each into its buffer.

    What several devices hold of a box is better read together: from an object
    store the parts of a row come with one request.

    Args:
      path: a key of `specs`.
      parts: boxes, as one slice of step 1 per dimension or None for the whole
        array, and C-contiguous buffers of their shape and the stored dtype. A
        buffer must not be touched before the future is done.

    Returns:
      A future whose `result()` waits until all buffers are filled.

    Raises:
      ValueError: unknown path, or an index or a buffer that does not fit.
    """
    spec = self._spec(path)
    boxes = []
    for index, out in parts:
      box = resolve_index(index, spec.shape, path)
      if (
        out.shape != box_shape(box)
        or out.dtype != spec.dtype
        or not out.flags.c_contiguous
        or not out.flags.writeable
      ):
        raise ValueError(
          f'{path}: the buffer is {out.dtype}{list(out.shape)}, but box'
          f' {index} of this array needs a writeable C-contiguous'
          f' {spec.dtype}{list(box_shape(box))}.'
        )
      boxes.append((box, out))
    return self._start_read(path, boxes)

  @abc.abstractmethod
  def _start_read(
    self, path: str, parts: Sequence[tuple[Index, np.ndarray]]
  ) -> Future:
    """`read_parts` once the arguments are known to fit."""

  @abc.abstractmethod
  def storage(self, path: str) -> Storage:
    """How the array lies on disk. Raises ValueError if the path is unknown."""

  @property
  def decoding_bytes(self) -> int:
    """Host memory that reading takes at most, beside the caller's buffers."""
    return 0

  @abc.abstractmethod
  def files(self) -> Iterable[epath.Path]:
    """The files that it is read from, as they are now."""

  @functools.cached_property
  def directories(self) -> set[epath.Path]:
    """Where these files lie, links followed."""
    return {remote.real_path(file).parent for file in self.files()}

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """A hex digest that changes when the checkpoint does; reads no weights."""

  def _spec(self, path: str) -> jax.ShapeDtypeStruct:
    if path not in self.specs:
      raise ValueError(
        f'{path!r} is not an array of {self.path}. `specs` lists all paths.'
        + checks.nearest(path, list(self.specs))
      )
    return self.specs[path]


def resolve_index(
  index: Sequence[slice] | None, shape: Sequence[int], path: str
) -> Index:
  """Gives every slice a start and a stop; None means the whole array.

  Raises:
    ValueError: not one slice of step 1 per dimension.
  """
  if index is None:
    index = (slice(None),) * len(shape)
  if len(index) != len(shape) or any(s.step not in (None, 1) for s in index):
    raise ValueError(
      f'{path}: index {tuple(index)} does not fit shape {tuple(shape)}; give'
      ' one slice of step 1 per dimension.'
    )
  bounds = (s.indices(size) for s, size in zip(index, shape, strict=True))
  return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)


def box_shape(box: Index) -> tuple[int, ...]:
  return tuple(s.stop - s.start for s in box)


def _bounds(box: Index) -> tuple[tuple[int, int], ...]:
  # Slices are hashable only from Python 3.12 on.
  return tuple((s.start, s.stop) for s in box)


def collect_specs(
  leaves: Iterable[tuple[str, jax.ShapeDtypeStruct]],
) -> dict[str, jax.ShapeDtypeStruct]:
  """Makes a dict of paths and specs.

  Raises:
    ValueError: two leaves have the same path, as `{'a/b': x}` and
      `{'a': {'b': y}}` do.
  """
  specs = {}
  for path, spec in leaves:
    if path in specs:
      raise ValueError(
        f'Two arrays have the path {path!r}: a key that contains "/" spells'
        ' the same path as nested keys. Rename one of them.'
      )
    specs[path] = spec
  return specs


def digest(
  metadata: Iterable[bytes], files: Iterable[tuple[str, epath.Path]]
) -> str:
  """Hashes metadata by content and data files by name and `contents.states`.

  Args:
    metadata: contents of files, in a fixed order.
    files: names that do not depend on where the checkpoint lies, and paths.

  Returns:
    32 hex digits.
  """
  state = hashlib.blake2b(digest_size=16)
  for content in metadata:
    state.update(len(content).to_bytes(8, 'little') + content)
  names_paths = list(files)
  found = contents.states([path for _, path in names_paths])
  for (name, _), file_state in zip(names_paths, found, strict=True):
    state.update(f'{name}\0{file_state}\0'.encode())
  return state.hexdigest()
