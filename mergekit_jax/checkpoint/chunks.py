"""How the chunks of a zarr array are encoded, and where their bytes lie.

TensorStore fetches whole chunks from an object store, and maps local files anew
for each. Where a chunk is nothing but its elements in row-major order, the
bytes of a part of it can be read instead.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
from typing import Any, cast

import tensorstore as ts

from mergekit_jax.checkpoint import contents, ocdbt_values, ranges, source

# Codecs that leave every element where arithmetic finds it.
_PLAIN_CODECS = {'bytes', 'crc32c', 'sharding_indexed', 'transpose'}
# Codecs that do nothing at all, on a machine with little-endian numbers.
_RAW = (
  [{'name': 'bytes'}],
  [{'name': 'bytes', 'configuration': {'endian': 'little'}}],
)

# Says where a cell of the grid of chunks lies.
_Locate = Callable[[tuple[int, ...]], tuple[ts.KvStore, bytes]]


def is_compressed(store: ts.TensorStore) -> bool:
  codec: Any = cast(ts.CodecSpec, store.codec).to_json()
  if codec['driver'] == 'zarr':
    return codec['compressor'] is not None or bool(codec['filters'])
  return not set(_names(codec['codecs'])) <= _PLAIN_CODECS


def _names(codecs: list[dict[str, Any]]) -> Iterator[str]:
  for codec in codecs:
    yield codec['name']
    yield from _names(codec.get('configuration', {}).get('codecs', []))


def raw_pieces(
  store: ts.TensorStore,
  directory: Callable[[str], dict[str, Any]],
  context: ts.Context,
  *,
  name: str,
  may_lack: bool,
  local: Callable[[str], ocdbt_values.Extent | bytes | None] | None = None,
) -> Callable[[source.Index], Iterator[ranges.Piece]] | None:
  """A function that gives the chunks that a box touches, as they are stored.

  Args:
    store: the array.
    directory: gives the kvstore spec of something inside its directory.
    context: what such stores are opened in.
    name: what to call the array in errors.
    may_lack: whether a chunk that is all fill value need not be stored.
    local: gives where what is stored under a key lies on a local disk, None if
      there is no such thing.

  Returns:
    The function, or None if a stored chunk is not its elements in row-major
    order, least significant byte first.
  """
  spec: Any = store.spec().to_json()
  metadata = spec['metadata']
  kvstore = cast(ts.KvStore, store.kvstore)
  if spec['driver'] == 'zarr':
    locate = _zarr2(metadata, kvstore)
  elif metadata['codecs'] in _RAW:
    locate = _zarr3(metadata, kvstore)
  elif local is not None:
    return None  # TensorStore knows where in a shard its chunks lie
  else:
    locate = _zarr3_shards(metadata, directory, context)
  if locate is None:
    return None
  # TensorStore says None for scalars.
  chunk: Any = store.chunk_layout.read_chunk.shape or ()

  def fetch(cell: tuple[int, ...], start: int, stop: int) -> bytes | None:
    try:
      return contents.fetched(*locate(cell), slice(start, stop), name)
    except FileNotFoundError:
      if not may_lack:
        raise
      return None

  def piece(cell: tuple[int, ...], origin: tuple[int, ...]) -> ranges.Piece:
    if local is None:
      return ranges.Piece(origin, chunk, functools.partial(fetch, cell))
    store, key = locate(cell)
    found = local(f'{store.path}{key.decode()}')
    if isinstance(found, ocdbt_values.Extent):
      into = contents.reads_into(found.file, found.offset, found.length)
      return ranges.Piece(origin, chunk, read_into=into)

    def fetch_found(start: int, stop: int) -> bytes | None:
      if found is None and not may_lack:
        raise FileNotFoundError(f'{name}: chunk {key.decode()} is not stored.')
      return found and found[start:stop]

    return ranges.Piece(origin, chunk, fetch_found)

  def pieces(box: source.Index) -> Iterator[ranges.Piece]:
    touched = (
      range(s.start // size, -(-s.stop // size))
      for s, size in zip(box, chunk, strict=True)
    )
    for cell in itertools.product(*touched):
      origin = tuple(i * size for i, size in zip(cell, chunk, strict=True))
      yield piece(cell, origin)

  return pieces


def _zarr2(metadata: dict[str, Any], kvstore: ts.KvStore) -> _Locate | None:
  dtype = metadata['dtype']
  if (
    metadata['compressor'] is not None
    or metadata['filters']
    or metadata['order'] != 'C'
    or not isinstance(dtype, str)
    or dtype.startswith('>')
  ):
    return None
  separator = metadata.get('dimension_separator', '.')

  def locate(cell: tuple[int, ...]) -> tuple[ts.KvStore, bytes]:
    return kvstore, (separator.join(map(str, cell)) or '0').encode()

  return locate


def _zarr3(metadata: dict[str, Any], kvstore: ts.KvStore) -> _Locate:
  def locate(cell: tuple[int, ...]) -> tuple[ts.KvStore, bytes]:
    return kvstore, _zarr3_key(metadata, cell).encode()

  return locate


def _zarr3_shards(
  metadata: dict[str, Any],
  directory: Callable[[str], dict[str, Any]],
  context: ts.Context,
) -> _Locate | None:
  """Chunks inside of shards, which is how Orbax writes all of zarr3."""
  outer = metadata['chunk_grid']['configuration']['chunk_shape']
  shards = metadata['codecs'][0].get('configuration', {})
  if len(metadata['codecs']) > 1 or shards.get('codecs') not in _RAW:
    return None
  grid = [o // i for o, i in zip(outer, shards['chunk_shape'], strict=True)]

  @functools.cache
  def opened(shard: str) -> ts.KvStore:
    return ts.KvStore.open(
      {
        'driver': 'zarr3_sharding_indexed',
        'base': directory(shard),
        'grid_shape': grid,
        'index_codecs': shards['index_codecs'],
        'index_location': shards['index_location'],
        'cache_pool': 'cache_pool#ocdbt',
      },
      context=context,
    ).result()

  def locate(cell: tuple[int, ...]) -> tuple[ts.KvStore, bytes]:
    shard = tuple(i // n for i, n in zip(cell, grid, strict=True))
    inside = [i % n for i, n in zip(cell, grid, strict=True)]
    key = b''.join(i.to_bytes(4, 'big') for i in inside)
    return opened(_zarr3_key(metadata, shard)), key

  return locate


def _zarr3_key(metadata: dict[str, Any], cell: tuple[int, ...]) -> str:
  encoding = metadata['chunk_key_encoding']
  given = encoding.get('configuration', {}).get('separator')
  numbers = [str(i) for i in cell]
  if encoding['name'] == 'v2':
    return (given or '.').join(numbers) or '0'
  return (given or '/').join(['c', *numbers])
