"""Reading safetensors checkpoints: one file, or shards with an index.

The safetensors library gives numpy no float8 and reads whole tensors of remote
files, so the header is read here, and boxes as ranges of bytes.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from etils import epath
import numpy as np

from mergekit_jax.checkpoint import (
  contents,
  ranges,
  remote,
  safetensors_layout,
  source,
)


class SafetensorsCheckpoint(source.Checkpoint):
  """The tensors of one or several safetensors files.

  Attributes:
    places: the name of the file that holds each tensor.
    stem: what the files are called, without numbers and endings.
    index_metadata: the metadata of the index, if there is one.
  """

  format = 'safetensors'

  def __init__(
    self,
    path: epath.Path,
    shards: Mapping[epath.Path, set[str] | None],
    index: str,
  ):
    """Reads the headers.

    Args:
      path: the path the user gave.
      shards: see `safetensors_layout.find_shards`.
      index: likewise.

    Raises:
      ValueError: a shard is damaged or lacks a tensor.
      OSError: a shard is remote and cannot be reached.
    """
    # They are read later, whatever the working directory is then.
    shards = {file.absolute(): names for file, names in shards.items()}
    self.places: dict[str, str] = {}
    self._headers: list[bytes] = []
    self._files = sorted(shards)
    self.stem = safetensors_layout.stem(index or self._files[0].name)
    self.index_metadata = (
      safetensors_layout.index_metadata(path / index) if index else {}
    )
    # What fetches from the file of each tensor, if it is remote; the file; and
    # where in it the tensor begins.
    self._lies: dict[str, tuple[Any, str, int]] = {}
    self._reader = ranges.Reader(remote.is_local(path))
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
          f'{file} lacks the tensor {missing[0]!r} that {index} says it holds'
          f' ({len(missing)} missing in all). Restore the file from a copy.'
        )
      fetch = None if remote.is_local(file) else contents.bytes_of(file)
      # A path is put together each time that it is asked for.
      location, file_name = str(file), file.name
      for name, spec in header.specs.items():
        if name in names:
          specs[name] = spec
          self.places[name] = file_name
          self._lies[name] = fetch, location, header.starts[name]
    super().__init__(
      path,
      specs=specs,
      tree={name: name for name in specs},
      metadata=metadata,
    )

  def storage(self, path: str) -> source.Storage:
    return source.Storage(chunk=self._spec(path).shape, compressed=False)

  @property
  def decoding_bytes(self) -> int:
    if remote.is_local(self.path):
      return 0
    sizes = map(safetensors_layout.nbytes, self.specs.values())
    return ranges.fetching_bytes(max(sizes, default=0))

  def files(self) -> list[epath.Path]:
    return self._files

  def fingerprint(self) -> str:
    return source.digest(
      self._headers, [(file.name, file) for file in self._files]
    )

  def _start_read(
    self, path: str, parts: Sequence[tuple[source.Index, np.ndarray]]
  ) -> source.Future:
    piece = self._piece(path)
    return self._reader.read(lambda box: [piece], parts)

  def _piece(self, path: str) -> ranges.Piece:
    fetch, location, start = self._lies[path]
    spec = self.specs[path]
    size = safetensors_layout.nbytes(spec)
    return ranges.Piece(
      (0,) * len(spec.shape),
      spec.shape,
      fetch and functools.partial(_fetch_from, fetch, start),
      None if fetch else contents.reads_into(location, start, size),
    )


def _fetch_from(fetch: Any, origin: int, start: int, stop: int) -> bytes:
  """Bytes counted from the beginning of a tensor."""
  return fetch(origin + start, origin + stop)
