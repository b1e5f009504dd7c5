"""Reading Orbax checkpoints.

Orbax says which arrays there are; TensorStore reads them, since Orbax has no
way to read a part of an array.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import math
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mergekit_jax.checkpoint import orbax_layout, remote, source

_STRINGS = '_strings.json'
# What Orbax calls the types whose leaves are stored as arrays.
_ARRAY_TYPES = {
  'jax.Array': jax.Array,
  'np.ndarray': np.ndarray,
  'scalar': np.number,
}
# Codecs that leave every element where arithmetic finds it.
_PLAIN_CODECS = {'bytes', 'crc32c', 'sharding_indexed', 'transpose'}


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
    # TensorStore takes absolute paths only.
    self._item = item.absolute() if source.is_local(item) else item
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

    tree = self._read_tree()
    arrays = list(_arrays(tree, ()))
    # What Orbax calls the array, which is also where it is stored.
    self._names = {path: leaf.name for path, leaf in arrays}
    super().__init__(
      path,
      specs=source.collect_specs(
        (path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        for path, leaf in arrays
      ),
      tree=_plain_tree(tree, (), _read_strings(item)),
      metadata=self._custom_metadata(header),
      layout=self._layout,
    )

  def storage(self, path: str) -> source.Storage:
    store: Any = self._open(path)
    return source.Storage(
      # TensorStore says None for scalars.
      chunk=store.chunk_layout.read_chunk.shape or (),
      compressed=not source.is_local(self._item)
      or _is_compressed(store.codec.to_json()),
    )

  def fingerprint(self) -> str:
    files = sorted(
      (file.relative_to(self._item).as_posix(), file)
      for file in _files(self._item)
    )
    # Arrays lie in directories of their own.
    metadata = (
      file.read_bytes()
      for name, file in files
      if '/' not in name or name.startswith('array_metadatas/')
    )
    return source.digest(metadata, files)

  def _start_read(
    self, path: str, box: source.Index, out: np.ndarray
  ) -> source.Future:
    store = self._reader(path)
    if box:
      store = store[box][ts.d[:].translate_to[(0,) * len(box)]]
    read = ts.array(out, copy=False).write(store)
    return remote.Read.of(read, self._item)

  @functools.cached_property
  def decoding_bytes(self) -> int:
    # The chunk in use and the next one, so that boxes of a chunk that are read
    # one after the other decode it once.
    chunks = (
      math.prod(stored.chunk) * spec.dtype.itemsize
      for path, spec in self.specs.items()
      if (stored := self.storage(path)).compressed
    )
    return 2 * max(chunks, default=0)

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
    return _context(self._item, self.decoding_bytes)

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

  def _read_tree(self) -> Any:
    options: dict[str, Any] = {}
    if not source.is_local(self._item):
      # Orbax would open the arrays without our endpoint and retries.
      options['type_handler_registry'] = _registry(self._open_all)
    try:
      handler = ocp.PyTreeCheckpointHandler(**options)
      return handler.metadata(self._item).tree
    except Exception as error:
      if isinstance(error, OSError) and not source.is_local(self._item):
        raise
      raise ValueError(
        f'{self._item} is damaged: Orbax cannot read the metadata of its arrays'
        f' ({error}). Restore it from a copy.'
      ) from error

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


class _RemoteMetadata(ocp.type_handlers.ArrayHandler):
  """Tells Orbax the shapes of arrays that we opened."""

  def __init__(
    self, typestr: str, open_all: Callable[[Sequence[str]], list[Any]]
  ):
    super().__init__()
    self._typestr = typestr
    self._open_all = open_all

  def typestr(self) -> str:
    return self._typestr

  async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
    stores = self._open_all([info.name for info in infos])
    return [
      ocp.metadata.ArrayMetadata(
        name=info.name,
        directory=info.parent_dir,
        shape=store.shape,
        sharding=None,
        dtype=store.dtype.numpy_dtype,
      )
      for info, store in zip(infos, stores, strict=True)
    ]


def _registry(open_all: Callable[[Sequence[str]], list[Any]]) -> Any:
  return ocp.type_handlers.create_type_handler_registry(
    *(
      (type_, _RemoteMetadata(typestr, open_all))
      for typestr, type_ in _ARRAY_TYPES.items()
    ),
    (str, ocp.type_handlers.StringHandler()),
  )


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


def _is_compressed(codec: dict[str, Any]) -> bool:
  if codec['driver'] == 'zarr':
    return codec['compressor'] is not None or bool(codec['filters'])
  return not set(_codec_names(codec['codecs'])) <= _PLAIN_CODECS


def _codec_names(codecs: list[dict[str, Any]]) -> Iterator[str]:
  for codec in codecs:
    yield codec['name']
    yield from _codec_names(codec.get('configuration', {}).get('codecs', []))


def _children(node: Any) -> list[tuple[str, Any]] | None:
  if isinstance(node, dict):
    return [(str(key), child) for key, child in node.items()]
  if isinstance(node, (list, tuple)):
    return [(str(key), child) for key, child in enumerate(node)]
  return None


def _is_array(leaf: Any) -> bool:
  return isinstance(
    leaf, (ocp.metadata.ArrayMetadata, ocp.metadata.ScalarMetadata)
  )


def _arrays(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  children = _children(node)
  if children is not None:
    for key, child in children:
      yield from _arrays(child, (*keys, key))
  elif _is_array(node):
    yield '/'.join(keys), node


def _plain_tree(node: Any, keys: tuple[str, ...], strings: dict) -> Any:
  if isinstance(node, dict):
    return {
      key: _plain_tree(child, (*keys, str(key)), strings)
      for key, child in node.items()
    }
  if isinstance(node, (list, tuple)):
    return type(node)(
      _plain_tree(child, (*keys, str(key)), strings)
      for key, child in enumerate(node)
    )
  if isinstance(node, ocp.metadata.StringMetadata):
    return strings[node.name]
  return '/'.join(keys) if _is_array(node) else node


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
