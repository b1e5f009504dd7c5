"""Reading safetensors checkpoints: one file, or shards with an index.

A file is a JSON header that says where each tensor lies, then the tensors in
row-major order. The safetensors library gives numpy no float8 and copies a
slice twice, so the header is read here and the data is mapped.
"""

from collections.abc import Mapping
from concurrent import futures
import functools
import json
import math
import os
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from mergekit_jax.checkpoint import source

_SUFFIX = '.safetensors'
_INDEX = 'model.safetensors.index.json'
_DTYPES = {
  'BOOL': np.bool_,
  'U8': np.uint8,
  'I8': np.int8,
  'U16': np.uint16,
  'I16': np.int16,
  'U32': np.uint32,
  'I32': np.int32,
  'U64': np.uint64,
  'I64': np.int64,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
  'F32': np.float32,
  'F64': np.float64,
  'C64': np.complex64,
  'F8_E4M3': jnp.float8_e4m3fn,
  'F8_E5M2': jnp.float8_e5m2,
  'F8_E8M0': jnp.float8_e8m0fnu,
}
# The header's length in bytes, a little-endian uint64, comes first.
_LENGTH_BYTES = 8
# Enough reads in flight to keep a disk busy.
_THREADS = 8


class SafetensorsCheckpoint(source.Checkpoint):
  """The tensors of one or several safetensors files."""

  format = 'safetensors'

  def __init__(
    self, path: epath.Path, shards: Mapping[epath.Path, set[str] | None]
  ):
    """Reads the headers and maps the files.

    Args:
      path: the path the user gave.
      shards: see `find_shards`.

    Raises:
      ValueError: a shard is damaged, lacks a tensor, or is not on a local disk.
    """
    self._headers: list[bytes] = []
    self._files = sorted(shards)
    # The bytes of every tensor, not read before they are looked at.
    self._bytes: dict[str, np.ndarray] = {}
    specs, metadata = {}, {}
    for file in self._files:
      raw_header, data = _map(file)
      self._headers.append(raw_header)
      header = _parse_header(raw_header, file)
      metadata |= header.pop('__metadata__', {})
      names = shards[file]
      if names is None:
        names = set(header)
      elif missing := sorted(names - set(header)):
        raise ValueError(
          f'{file} lacks the tensor {missing[0]!r} that {_INDEX} says it holds'
          f' ({len(missing)} missing in all). Restore the file from a copy.'
        )
      for name in header:
        if name in names:
          specs[name] = _spec_of(name, header[name], file)
          self._bytes[name] = _bytes_of(
            name, header[name], specs[name], data, file
          )
    super().__init__(
      path,
      specs=specs,
      tree={name: name for name in specs},
      metadata=metadata,
    )

  def storage(self, path: str) -> source.Storage:
    return source.Storage(chunk=self._spec(path).shape, compressed=False)

  def fingerprint(self) -> str:
    return source.digest(
      self._headers, [(file.name, file) for file in self._files]
    )

  def _start_read(
    self, path: str, box: source.Index, out: np.ndarray
  ) -> source.Future:
    def copy() -> None:
      spec = self.specs[path]
      out[...] = self._bytes[path].view(spec.dtype).reshape(spec.shape)[box]

    return _pool().submit(copy)


def find_shards(path: epath.Path) -> dict[epath.Path, set[str] | None] | None:
  """Finds the files of a safetensors checkpoint.

  Args:
    path: a safetensors file, or a directory that holds one or several.

  Returns:
    Each file with the names of the tensors that the index places in it (None if
    there is no index), or None if there are no safetensors files.

  Raises:
    ValueError: the index is damaged or names a file that is not there, or there
      are several files and no index.
  """
  if not path.is_dir():
    return {path: None} if path.name.endswith(_SUFFIX) else None
  if (path / _INDEX).exists():
    return _shards_of_index(path)
  files = sorted(f for f in path.iterdir() if f.name.endswith(_SUFFIX))
  if len(files) > 1:
    raise ValueError(
      f'{path} holds {[file.name for file in files]} but no {_INDEX} that'
      ' joins them. Give the path of one file, or add the index.'
    )
  return {files[0]: None} if files else None


def _shards_of_index(path: epath.Path) -> dict[epath.Path, set[str] | None]:
  try:
    places = json.loads((path / _INDEX).read_text())['weight_map']
  except (ValueError, KeyError) as error:
    raise ValueError(
      f'{path / _INDEX} is damaged ({error!r}). Restore it from a copy.'
    ) from error
  shards = {}
  for name, file_name in places.items():
    shards.setdefault(path / file_name, set()).add(name)
  for file, names in shards.items():
    if not file.exists():
      raise ValueError(
        f'{file} is missing. {_INDEX} says it holds {min(names)!r}'
        f' ({len(names)} tensors in all). Restore the file from a copy.'
      )
  return shards


def _map(file: epath.Path) -> tuple[bytes, np.ndarray]:
  """The header's bytes, and the data behind it mapped as uint8."""
  if not source.is_local(file):
    raise ValueError(
      f'{file} is not on a local file system, and safetensors files are read'
      ' by mapping them. Copy them to a disk, or convert them to Orbax.'
    )
  if file.stat().length <= _LENGTH_BYTES:
    raise _damaged(file, 'it is too short to have a header')
  mapped = np.memmap(os.fspath(file), np.uint8, 'r')
  length = int.from_bytes(mapped[:_LENGTH_BYTES].tobytes(), 'little')
  end = _LENGTH_BYTES + length
  if end > mapped.size:
    raise _damaged(
      file,
      f'its header should be {length} bytes long, but only'
      f' {mapped.size - _LENGTH_BYTES} bytes follow',
    )
  return mapped[_LENGTH_BYTES:end].tobytes(), mapped[end:]


def _parse_header(raw: bytes, file: epath.Path) -> dict[str, Any]:
  try:
    return json.loads(raw)
  except ValueError as error:
    raise _damaged(file, f'its header is not JSON ({error})') from error


def _spec_of(
  name: str, entry: Mapping[str, Any], file: epath.Path
) -> jax.ShapeDtypeStruct:
  if entry['dtype'] not in _DTYPES:
    raise ValueError(
      f'{file}: the tensor {name!r} is stored as {entry["dtype"]}, which numpy'
      f' cannot hold. Supported: {", ".join(_DTYPES)}.'
    )
  return jax.ShapeDtypeStruct(entry['shape'], _DTYPES[entry['dtype']])


def _bytes_of(
  name: str,
  entry: Mapping[str, Any],
  spec: jax.ShapeDtypeStruct,
  data: np.ndarray,
  file: epath.Path,
) -> np.ndarray:
  start, stop = entry['data_offsets']
  size = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
  if stop - start != size or stop > data.size:
    raise _damaged(
      file,
      f'the tensor {name!r} ({spec.dtype}{list(spec.shape)}, {size} bytes)'
      f' should lie in bytes {start} to {stop} of {data.size}',
    )
  return data[start:stop]


def _damaged(file: epath.Path, why: str) -> ValueError:
  return ValueError(
    f'{file} is damaged or cut off: {why}. Restore it from a copy.'
  )


@functools.cache
def _pool() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(_THREADS, 'read_safetensors')
