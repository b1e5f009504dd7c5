"""Reading safetensors checkpoints: one file, or shards with an index.

The safetensors library gives numpy no float8 and copies a slice twice, so the
header is read here and the data is mapped.
"""

from collections.abc import Mapping
from concurrent import futures
import functools
import os

from etils import epath
import numpy as np

from mergekit_jax.checkpoint import safetensors_layout, source

# Enough reads in flight to keep a disk busy.
_THREADS = 8


class SafetensorsCheckpoint(source.Checkpoint):
  """The tensors of one or several safetensors files.

  Attributes:
    places: the name of the file that holds each tensor.
  """

  format = 'safetensors'

  def __init__(
    self, path: epath.Path, shards: Mapping[epath.Path, set[str] | None]
  ):
    """Reads the headers and maps the files.

    Args:
      path: the path the user gave.
      shards: see `safetensors_layout.find_shards`.

    Raises:
      ValueError: a shard is damaged, lacks a tensor, or is not on a local disk.
    """
    self.places: dict[str, str] = {}
    self._headers: list[bytes] = []
    self._files = sorted(shards)
    # The bytes of every tensor, not read before they are looked at.
    self._bytes: dict[str, np.ndarray] = {}
    specs, metadata = {}, {}
    for file in self._files:
      header = safetensors_layout.read_header(file)
      self._headers.append(header.raw)
      metadata |= header.metadata
      names = shards[file]
      if names is None:
        names = set(header.specs)
      elif missing := sorted(names - set(header.specs)):
        raise ValueError(
          f'{file} lacks the tensor {missing[0]!r} that'
          f' {safetensors_layout.INDEX} says it holds ({len(missing)} missing'
          ' in all). Restore the file from a copy.'
        )
      mapped = np.memmap(os.fspath(file), np.uint8, 'r')
      for name, spec in header.specs.items():
        if name in names:
          start = header.starts[name]
          specs[name] = spec
          self.places[name] = file.name
          self._bytes[name] = mapped[
            start : start + safetensors_layout.nbytes(spec)
          ]
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


@functools.cache
def _pool() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(_THREADS, 'read_safetensors')
