"""Writing a safetensors checkpoint box by box.

All sizes are known beforehand, so every file is made in full first, header and
room for the tensors, and boxes are then written into their places in any order.
"""

from collections.abc import Callable, Mapping
from concurrent import futures
import contextlib
import json
import os
from typing import Any

from etils import epath
import jax
import numpy as np

from mergekit_jax import checks, processes
from mergekit_jax.checkpoint import (
  companions,
  direct,
  files,
  remote,
  replace,
  row_major,
  safetensors_layout,
  source,
)
from mergekit_jax.checkpoint.safetensors import SafetensorsCheckpoint
from mergekit_jax.checkpoint.writer import BoxWriter, Write
from mergekit_jax.tree import path_of

# Enough writes in flight to keep a disk busy.
_THREADS = 4


def write_safetensors(
  path: epath.PathLike,
  specs: Any,
  like: source.Checkpoint | None,
  produce: Callable[[Write], None],
  *,
  shard_size: int | str | None = None,
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes a checkpoint whose arrays are handed over box by box.

  Every process calls this with the same arguments and writes its own boxes.
  What a killed attempt has left in `<path>.mergekit-tmp` is kept, so that
  `produce` need only write what is missing.

  Args:
    path: directory of the new checkpoint; it must not exist.
    specs: the tree to write, with a `jax.ShapeDtypeStruct` for every array. A
      tensor is called by the keys of its array joined by '/'; other leaves,
      for which the format has no place, are left out.
    like: the checkpoint to be like. If it is a safetensors checkpoint of
      several shards, each tensor lies in the shard of the same name as there;
      one file or an index is called as there too. Its configuration,
      tokenizer and code are copied, the configuration with the dtype that the
      tensors now have. Its metadata is kept.
    produce: called once with `write(path, index, block) -> future`, where
      `path` is the name of a tensor, `index` has one slice per dimension and
      `block` is that box of the tensor, on the host or a CPU device. The block
      is not copied where that can be avoided: leave it alone until the
      future's `result()` has returned. `produce` may return with writes under
      way.
    shard_size: most bytes of tensors in a file, as a number or as text such as
      '5GB'; a larger tensor has a file of its own. None means the shards of
      `like`, else one file.
    metadata: metadata of the checkpoint; what is not text is written as JSON.

  Raises:
    ValueError: `path` is remote, there are no arrays, two have the same name,
      the format lacks a dtype, or `write` is given a box that does not fit.
    OSError: there is no room for the checkpoint on the disk.
    BaseException: whatever `produce` raises.
  """
  path = epath.Path(path)
  if not remote.is_local(path):
    raise ValueError(
      f'{path} is not on a local file system, and safetensors files are'
      " written in place. Give a local path, or format='orbax'."
    )
  path = path.absolute()
  arrays = _arrays(specs)
  stem = like.stem if isinstance(like, SafetensorsCheckpoint) else 'model'
  shards = _shards(arrays, like, stem, shard_size)
  kept = like.metadata if like else {}
  text = {
    key: value if isinstance(value, str) else json.dumps(value)
    for key, value in {**kept, **(metadata or {})}.items()
  }
  headers = {
    file: safetensors_layout.make_header({n: arrays[n] for n in names}, text)
    for file, names in shards.items()
  }
  stage = replace.beside(path, 'tmp')
  processes.on_primary(lambda: _make_files(stage, headers))
  # What is there counts: an earlier attempt, or another process, may have been
  # told another path of a source, which the header holds.
  headers = {
    name: safetensors_layout.read_header(stage / name) for name in headers
  }
  _fill(stage, headers, arrays, produce)
  processes.barrier('safetensors written')
  processes.on_primary(lambda: _commit(stage, path, headers, like, stem))


def _arrays(specs: Any) -> dict[str, jax.ShapeDtypeStruct]:
  arrays = source.collect_specs(
    (path_of(keys), leaf)
    for keys, leaf in jax.tree.leaves_with_path(specs)
    if isinstance(leaf, jax.ShapeDtypeStruct)
  )
  if not arrays:
    raise ValueError('The tree to write has no jax.ShapeDtypeStruct leaf.')
  return arrays


def _shards(
  arrays: Mapping[str, jax.ShapeDtypeStruct],
  like: source.Checkpoint | None,
  stem: str,
  shard_size: int | str | None,
) -> dict[str, list[str]]:
  """The tensors of every file."""
  if shard_size is not None:
    limit = checks.size('shard_size', shard_size)
    groups, room = [], 0
    for name, spec in arrays.items():
      nbytes = safetensors_layout.nbytes(spec)
      if not groups or nbytes > room:
        groups.append([])
        room = limit
      groups[-1].append(name)
      room -= nbytes
    if len(groups) > 1:
      return {
        f'{stem}-{number:05}-of-{len(groups):05}.safetensors': names
        for number, names in enumerate(groups, 1)
      }
  elif isinstance(like, SafetensorsCheckpoint):
    shards: dict[str, list[str]] = {}
    if len(set(like.places.values())) > 1 and arrays.keys() <= set(like.places):
      for name in arrays:
        shards.setdefault(like.places[name], []).append(name)
      return shards
  return {_one_file(stem): list(arrays)}


def _one_file(stem: str) -> str:
  """The name of a file that needs no index."""
  return stem + safetensors_layout.SUFFIX


def _make_files(
  stage: epath.Path, headers: Mapping[str, safetensors_layout.Header]
) -> None:
  """Makes the files that an earlier attempt has not made."""
  stage.mkdir(parents=True, exist_ok=True)
  for name, header in headers.items():
    file = os.open(stage / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      if any(os.pread(file, len(header.raw), 0)):
        _demand_same_tensors(stage / name, header)
        continue
      files.allocate(file, header.size, stage / name)
      # Last, since a file with a header is taken for one that has its size.
      files.write_at(file, memoryview(header.raw), 0)
      os.fsync(file)
    finally:
      os.close(file)


def _demand_same_tensors(
  file: epath.Path, header: safetensors_layout.Header
) -> None:
  try:
    begun = safetensors_layout.read_header(file).specs
  except ValueError:
    begun = None
  if begun != header.specs:
    raise ValueError(
      f'{file.parent} holds the beginnings of another checkpoint. Delete it.'
    )


def _fill(
  stage: epath.Path,
  headers: Mapping[str, safetensors_layout.Header],
  arrays: Mapping[str, jax.ShapeDtypeStruct],
  produce: Callable[[Write], None],
) -> None:
  places = {
    tensor: (stage / name, start)
    for name, header in headers.items()
    for tensor, start in header.starts.items()
  }
  with futures.ThreadPoolExecutor(_THREADS, 'write_safetensors') as pool:
    writer = _Writer(arrays, places, pool)
    try:
      produce(writer)
      writer.finish()
    except BaseException:
      writer.abandon()
      raise


class _Writer(BoxWriter):
  """Writes boxes into the files, in threads."""

  def __init__(
    self,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    places: Mapping[str, tuple[epath.Path, int]],
    pool: futures.Executor,
  ):
    super().__init__(specs)
    self._places = places
    self._pool = pool
    self._buffer = direct.Buffer()

  def _start(
    self, path: str, box: source.Index, block: np.ndarray
  ) -> futures.Future:
    return self._pool.submit(self._write, path, box, block)

  def _write(self, path: str, box: source.Index, block: np.ndarray) -> None:
    place, start = self._places[path]
    # A file is open only while a box is written: ten outputs of sixty shards
    # have more files than a process may have open. To open one takes far less
    # than to sync it.
    with contextlib.closing(direct.File(place, self._buffer)) as file:
      _write_box(file, start, self._specs[path].shape, box, block)
      # What is told to be written is not written again after a power failure.
      file.sync()


def _write_box(
  file: direct.File,
  start: int,
  shape: tuple[int, ...],
  box: source.Index,
  block: np.ndarray,
) -> None:
  """Writes a box of a row-major tensor that begins at byte `start`."""
  data: Any = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
  whole = tuple(slice(0, size) for size in block.shape)
  for at, first, length in row_major.runs(
    shape, box, block.shape, whole, block.itemsize
  ):
    file.write(memoryview(data)[first : first + length], start + at)


def _commit(
  stage: epath.Path,
  path: epath.Path,
  headers: Mapping[str, safetensors_layout.Header],
  like: source.Checkpoint | None,
  stem: str,
) -> None:
  """Adds what lies beside the weights, and moves the stage to its place."""
  if like:
    companions.copy(like, stage, _changed_dtype(headers, like))
  if list(headers) != [_one_file(stem)]:
    specs = [spec for h in headers.values() for spec in h.specs.values()]
    kept = (
      like.index_metadata if isinstance(like, SafetensorsCheckpoint) else {}
    )
    size = sum(map(safetensors_layout.nbytes, specs))
    index = {
      'metadata': {**kept, 'total_size': size},
      'weight_map': {
        name: file for file, h in headers.items() for name in h.specs
      },
    }
    file = stage / (stem + safetensors_layout.INDEX_SUFFIX)
    file.write_text(json.dumps(index, indent=2) + '\n')
  files.sync_all(stage)
  stage.rename(path)
  files.sync(path.parent)


def _changed_dtype(
  headers: Mapping[str, safetensors_layout.Header], like: source.Checkpoint
) -> str | None:
  """The dtype of the tensors that have another one than in `like`."""
  dtypes = {
    spec.dtype.name
    for header in headers.values()
    for name, spec in header.specs.items()
    if name in like.specs and spec.dtype != like.specs[name].dtype
  }
  return dtypes.pop() if len(dtypes) == 1 else None
