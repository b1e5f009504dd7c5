"""Reading Orbax checkpoints.

Orbax says which arrays there are; TensorStore reads them, since Orbax has no
way to read a part of an array.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import os
from typing import Any

from etils import epath
import jax
import numpy as np
import tensorstore as ts

from mergekit_jax.checkpoint import (
  chunks,
  ocdbt_values,
  orbax_layout,
  orbax_tree,
  ranges,
  remote,
  source,
)

_STRINGS = '_strings.json'


class OrbaxCheckpoint(source.Checkpoint):
  """One PyTree item of an Orbax checkpoint."""

  format = 'orbax'

  def __init__(self, path: epath.Path, item: epath.Path, name: str):
    """Opens the item.

    Args:
      path: the path the user gave.
      item: the directory that holds `_METADATA`.
      name: `item` relative to the top of the checkpoint.

    Raises:
      ValueError: damaged metadata, or two arrays with the same path.
      OSError: the checkpoint is remote and cannot be reached.
    """
    self._found = item
    # TensorStore takes absolute paths only.
    self._item = item.absolute() if remote.is_local(item) else item
    header = orbax_layout.read_json(item / orbax_layout.ITEM_METADATA)
    self._layout = source.OrbaxLayout(
      item=name,
      use_ocdbt=header.get('use_ocdbt', True),
      use_zarr3=header.get('use_zarr3') or False,
    )
    # Before this field existed, chunks of zeros were not stored at all.
    self._stores_zeros = header.get('store_array_data_equal_to_fill_value')
    self._context = _context(item)
    self._stores: dict[str, ts.TensorStore] = {}
    self._readers: dict[str, ts.TensorStore] = {}
    self._raw: dict[str, Any] = {}
    self._ranges = ranges.Reader(remote.is_local(item))

    tree = orbax_tree.read(self._item, self._open_all)
    arrays = list(orbax_tree.arrays(tree))
    # What Orbax calls the array, which is also where it is stored.
    self._names = {path: leaf.name for path, leaf in arrays}
    self._layout = dataclasses.replace(
      self._layout,
      random_keys=self._by_path(orbax_layout.random_keys(item)),
      shardings=self._by_path(orbax_layout.shardings(item)),
    )
    super().__init__(
      path,
      specs=source.collect_specs(
        (path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        for path, leaf in arrays
      ),
      tree=orbax_tree.plain(tree, _read_strings(item)),
      metadata=self._custom_metadata(header),
      layout=self._layout,
    )

  @property
  def location(self) -> epath.Path:
    return self._found

  @property
  def items_beside(self) -> list[str]:
    was_given = self._found == self.path
    return [] if was_given else orbax_layout.items_beside(self._found)

  def storage(self, path: str) -> source.Storage:
    store: Any = self._open(path)
    return source.Storage(
      # TensorStore says None for scalars.
      chunk=store.chunk_layout.read_chunk.shape or (),
      compressed=self._raw_pieces(path) is None
      if not remote.is_local(self._item)
      else chunks.is_compressed(store),
    )

  def _by_path(self, by_name: Mapping[str, str]) -> dict[str, str]:
    return {
      path: by_name[name]
      for path, name in self._names.items()
      if name in by_name
    }

  def files(self) -> Iterator[epath.Path]:
    return _files(self._item)

  def fingerprint(self) -> str:
    files = sorted(
      (file.relative_to(self._item).as_posix(), file) for file in self.files()
    )
    # Arrays lie in directories of their own.
    metadata = (
      file.read_bytes()
      for name, file in files
      if '/' not in name or name.startswith('array_metadatas/')
    )
    return source.digest(metadata, files)

  def _start_read(
    self, path: str, parts: Sequence[tuple[source.Index, np.ndarray]]
  ) -> source.Future:
    if pieces := self._raw_pieces(path):
      return self._ranges.read(pieces, parts, self._open(path).fill_value)
    store = self._reader(path)
    return source.Joined(
      remote.Read.of(
        ts.array(out, copy=False).write(
          store[box][ts.d[:].translate_to[(0,) * len(box)]] if box else store
        ),
        self._item,
      )
      for box, out in parts
    )

  @functools.cached_property
  def decoding_bytes(self) -> int:
    if remote.is_local(self._item):
      fetched = 0
    else:
      sizes = (s.size * s.dtype.itemsize for s in self.specs.values())
      fetched = ranges.fetching_bytes(max(sizes, default=0))
    return fetched + self._cached_bytes

  @functools.cached_property
  def _cached_bytes(self) -> int:
    # The chunk in use and the next one, so that boxes of a chunk that are read
    # one after the other decode it once.
    sizes = (
      math.prod(stored.chunk) * spec.dtype.itemsize
      for path, spec in self.specs.items()
      if (stored := self.storage(path)).compressed
    )
    return 2 * max(sizes, default=0)

  def _raw_pieces(self, path: str) -> Any:
    """Where the bytes of an array lie that are as they are, else None."""
    local = remote.is_local(self._item)
    if local and self._places is None:
      return None
    if path not in self._raw:
      self._raw[path] = chunks.raw_pieces(
        self._open(path),
        lambda inside: _kvstore(
          self._item, f'{self._names[path]}/{inside}', self._layout.use_ocdbt
        ),
        self._context,
        name=f'{self._item}: {path}',
        may_lack=not self._stores_zeros,
        local=self._place if local else None,
      )
    return self._raw[path]

  @functools.cached_property
  def _places(self) -> dict[bytes, Any] | None:
    """Where a local OCDBT database keeps its values, if that can be told."""
    if not self._layout.use_ocdbt:
      return {}
    try:
      return ocdbt_values.places(self._item)
    except (KeyError, ValueError):
      return None

  def _place(self, key: str) -> ocdbt_values.Extent | bytes | None:
    if self._layout.use_ocdbt:
      return (self._places or {}).get(key.encode())
    exists = os.path.exists(key)
    size = os.path.getsize(key) if exists else 0
    return ocdbt_values.Extent(key, 0, size) if exists else None

  def _reader(self, path: str) -> ts.TensorStore:
    """The array, with a cache of decoded chunks if it is compressed."""
    if path not in self._readers:
      store = self._open(path)
      if self.storage(path).compressed:
        spec = store.spec().to_json() | {'recheck_cached_data': 'open'}
        store = ts.open(
          spec, open=True, read=True, context=self._decoding_context
        ).result()
      self._readers[path] = store
    return self._readers[path]

  @functools.cached_property
  def _decoding_context(self) -> ts.Context:
    return _context(self._item, self._cached_bytes)

  def _open(self, path: str) -> ts.TensorStore:
    self._spec(path)
    name = self._names[path]
    if name not in self._stores:
      future = remote.Read.of(self._start_open(name), self._item)
      self._stores[name] = future.result()
    return self._stores[name]

  def _start_open(self, name: str) -> Any:
    spec = {
      'driver': 'zarr3' if self._layout.use_zarr3 else 'zarr',
      'kvstore': _kvstore(self._item, name, self._layout.use_ocdbt),
      'fill_missing_data_reads': not self._stores_zeros,
    }
    return ts.open(spec, open=True, read=True, context=self._context)

  def _open_all(self, names: Sequence[str]) -> list[Any]:
    opening = {
      name: remote.Read.of(self._start_open(name), self._item) for name in names
    }
    self._stores |= {name: future.result() for name, future in opening.items()}
    return [self._stores[name] for name in names]

  def _custom_metadata(self, header: dict[str, Any]) -> dict[str, Any]:
    metadata = {}
    for directory in (self._item.parent, self._item):
      file = directory / orbax_layout.STEP_METADATA
      # A flat item's parent directory may hold an unrelated checkpoint.
      if file.exists() and (directory == self._item or self._has_parent(file)):
        metadata |= orbax_layout.read_json(file).get('custom_metadata') or {}
    return metadata | (header.get('custom_metadata') or {})

  def _has_parent(self, file: epath.Path) -> bool:
    handlers = orbax_layout.read_json(file).get('item_handlers')
    return isinstance(handlers, dict) and self._item.name in handlers


def _context(item: epath.Path, decoded_bytes: int = 0) -> ts.Context:
  """One context a checkpoint: a shared one could serve a replaced file."""
  options: dict[str, Any] = {
    'cache_pool': {'total_bytes_limit': decoded_bytes},
    'cache_pool#ocdbt': {'total_bytes_limit': 2**24},
  }
  return ts.Context(options | remote.context_options(item))


def _kvstore(item: epath.Path, name: str, use_ocdbt: bool) -> dict[str, Any]:
  if not use_ocdbt:
    return remote.kvstore(item, name)
  return {
    'driver': 'ocdbt',
    'base': remote.kvstore(item),
    'path': name,
    'cache_pool': 'cache_pool#ocdbt',
  }


def _read_strings(item: epath.Path) -> dict[str, str]:
  file = item / _STRINGS
  return orbax_layout.read_json(file) if file.exists() else {}


def _files(directory: epath.Path) -> Iterator[epath.Path]:
  if isinstance(directory, remote.RemotePath):
    yield from directory.walk_files()
    return
  for child in directory.iterdir():
    if child.is_dir():
      yield from _files(child)
    else:
      yield child
