"""What lies where in safetensors files: their headers and the index of shards.

A file is the length of its header, a JSON header that says where each tensor
lies, then the tensors in row-major order. Files come from strangers, so nothing
a header or an index says is believed before it is checked.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import math
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from mergekit_jax.checkpoint import contents

SUFFIX = '.safetensors'
INDEX_SUFFIX = f'{SUFFIX}.index.json'
INDEX = f'model{INDEX_SUFFIX}'
DTYPES = {
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
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_METADATA = '__metadata__'
# The header's length in bytes, a little-endian uint64, comes first.
_LENGTH_BYTES = 8
# How a pointer of git-lfs begins, which is text.
_LFS_POINTER = b'version '
# The format's own library reads none that is longer.
_LONGEST_HEADER = 100_000_000
# Data that begins here can be used in place.
_ALIGNMENT = 8
# What follows the stem in the name of a file, a numbered shard or an index.
_SHARD = re.compile(r'-\d+-of-(\d+)\.safetensors\Z')
_AFTER_STEM = re.compile(r'(-\d+-of-\d+)?\.safetensors(\.index\.json)?\Z')


@dataclasses.dataclass(frozen=True)
class Header:
  """What a file says of itself.

  Attributes:
    raw: its bytes, with the length before it.
    specs: shape and dtype of every tensor.
    starts: the byte of the file at which each tensor begins.
    metadata: the text saved with the tensors.
    size: the size of the file in bytes.
  """

  raw: bytes
  specs: Mapping[str, jax.ShapeDtypeStruct]
  starts: Mapping[str, int]
  metadata: Mapping[str, str]
  size: int


def find_shards(
  path: epath.Path,
) -> tuple[dict[epath.Path, set[str] | None], str] | None:
  """Finds the files of a safetensors checkpoint.

  Args:
    path: a safetensors file, or a directory that holds one or several.

  Returns:
    Each file with the names of the tensors that the index places in it (None if
    there is no index), and the name of the index ('' if there is none); or None
    if there are no safetensors files.

  Raises:
    ValueError: the index is damaged or names a file that is not there, or there
      are several indexes, an index and a whole model that it does not name, or
      several files, no index, and none is the whole model by its name.
  """
  if not path.is_dir():
    return ({path: None}, '') if path.name.endswith(SUFFIX) else None
  children = sorted(path.iterdir())
  # Not every name leads to a file: in a cache some lead nowhere.
  called = lambda suffix: [
    child
    for child in children
    if child.name.endswith(suffix) and child.is_file()
  ]
  indexes = [index.name for index in called(INDEX_SUFFIX)]
  if INDEX in indexes:
    indexes = [INDEX]
  if len(indexes) > 1:
    raise ValueError(
      f'{path} holds the indexes {indexes}, and which one is meant cannot be'
      ' told. Leave one of them there, or give the path of one file.'
    )
  if indexes:
    return _shards_of_index(path / indexes[0]), indexes[0]
  files, whole = called(SUFFIX), path / f'model{SUFFIX}'
  # Another model, such as an adapter, may lie beside the one of this name.
  if whole in files and not any(_SHARD.search(file.name) for file in files):
    files = [whole]
  if len(files) > 1:
    raise ValueError(
      f'{path} holds {[file.name for file in files]} but no {INDEX} that'
      ' joins them. Give the path of one file, or add the index.'
    )
  if not files:
    return None
  shards = _SHARD.search(files[0].name)
  if shards and int(shards[1]) > 1:
    raise ValueError(
      f'{path} holds {files[0].name} alone, one of {int(shards[1])} files, and '
      f'no {INDEX}. Fetch the others and the index, or give the path of the '
      'file if it is all that is meant.'
    )
  return {files[0]: None}, ''


def _shards_of_index(index: epath.Path) -> dict[epath.Path, set[str] | None]:
  try:
    places = _parse(index.read_bytes())['weight_map']
    names_files = dict(places).items()
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{index} is damaged ({error!r}). Restore it from a copy.'
    ) from error
  shards = {}
  for name, file_name in names_files:
    if not _is_plain_name(file_name):
      raise ValueError(
        f'{index} places {name!r} in {file_name!r}, but a shard is a'
        f' *{SUFFIX} file beside the index. Correct the index.'
      )
    shards.setdefault(index.parent / file_name, set()).add(name)
  whole = index.parent / index.name.removesuffix('.index.json')
  if whole not in shards and whole.is_file():
    raise ValueError(
      f'{index.parent} holds {whole.name}, which is a model to some readers, '
      f'and {index.name}, which names other files. Give the path of '
      f'{whole.name} if that is meant, or move it away.'
    )
  for file, names in shards.items():
    if not file.exists():
      raise ValueError(
        f'{file} is missing. {index.name} says it holds {min(names)!r}'
        f' ({len(names)} tensors in all). Restore the file from a copy.'
      )
  return shards


def index_metadata(index: epath.Path) -> dict[str, Any]:
  """What an index that has been found says beside the places of tensors."""
  metadata = _parse(index.read_bytes()).get('metadata')
  return metadata if isinstance(metadata, dict) else {}


def stem(name: str) -> str:
  """What a file, a numbered shard or an index is called before its ending."""
  return _AFTER_STEM.sub('', name)


def _is_plain_name(name: Any) -> bool:
  """Whether it names a file in the directory itself, on any system."""
  return (
    isinstance(name, str)
    and name.endswith(SUFFIX)
    and not set(name) & {'/', '\\', '\0'}
  )


def read_header(file: epath.Path) -> Header:
  """Reads and checks the header of a file; reads none of its tensors.

  Raises:
    ValueError: the file is damaged or cut off, or holds a dtype that numpy
      lacks.
    OSError: it is remote and cannot be reached.
  """
  fetch = contents.bytes_of(file)
  try:
    length = fetch(0, _LENGTH_BYTES)
  except EOFError as error:
    raise _damaged(file, 'it is too short to have a header') from error
  if length == _LFS_POINTER:
    raise ValueError(
      f'{file} is what git keeps in place of a large file. Fetch the file: git '
      'lfs pull.'
    )
  said = int.from_bytes(length, 'little')
  try:
    if said > _LONGEST_HEADER:
      raise EOFError
    raw = length + fetch(_LENGTH_BYTES, _LENGTH_BYTES + said)
  except EOFError as error:
    raise _damaged(
      file,
      f'its header should be {said} bytes long, but the file is shorter, or'
      f' that is more than the {_LONGEST_HEADER} of any header',
    ) from error
  try:
    entries = _parse(raw[_LENGTH_BYTES:])
    metadata = entries.pop(_METADATA, {})
    if not all(isinstance(v, str) for v in dict(metadata).values()):
      raise ValueError(f'{_METADATA} is not text by name')
    parsed = {name: _parse_entry(entry) for name, entry in entries.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _damaged(file, f'its header is malformed ({error!r})') from error
  for name, (dtype, _, _) in parsed.items():
    if dtype not in DTYPES:
      raise ValueError(
        f'{file}: the tensor {name!r} is stored as {dtype}, which numpy cannot'
        f' hold. Supported: {", ".join(DTYPES)}.'
      )
  spec_of = functools.cache(jax.ShapeDtypeStruct)  # slow to make
  specs = {n: spec_of(s, DTYPES[d]) for n, (d, s, _) in parsed.items()}
  offsets = {name: offsets for name, (_, _, offsets) in parsed.items()}
  size = len(raw) + _demand_tiled(file, specs, offsets)
  if longer := contents.compare_size(file, size):
    what = 'bytes follow' if longer > 0 else 'it ends before the end of'
    last = max(offsets, key=offsets.__getitem__, default='')
    raise _damaged(file, f'{what} the last tensor, {last!r}')
  starts = {name: len(raw) + start for name, (start, _) in offsets.items()}
  return Header(raw, specs, starts, metadata, size)


def make_header(
  specs: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str]
) -> Header:
  """Lays tensors out in a file that does not exist yet.

  Raises:
    ValueError: the format has no name for a dtype.
  """
  for name, spec in specs.items():
    if np.dtype(spec.dtype) not in _NAMES:
      is_float = lambda dtype: jnp.issubdtype(dtype, jnp.floating)
      floats = ', '.join(map(str, filter(is_float, _NAMES)))
      # Others are copied as they are, whatever dtype= says.
      other = f', or, if it is merged, dtype= one of {floats}'
      raise ValueError(
        f'{name} is {spec.dtype}, which safetensors files cannot hold. Give'
        f" format='orbax'{other if is_float(spec.dtype) else ''}."
      )
  # The largest elements first, so that all of them are aligned.
  offsets, end = {}, 0
  for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
    offsets[name] = end, end + nbytes(specs[name])
    end += nbytes(specs[name])
  entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
  for name, spec in specs.items():
    if name == _METADATA:
      raise ValueError(f'{name!r} is no name for a tensor; rename it.')
    entries[name] = {
      'dtype': _NAMES[np.dtype(spec.dtype)],
      'shape': spec.shape,
      'data_offsets': offsets[name],
    }
  text = json.dumps(entries, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % _ALIGNMENT)
  raw = len(text).to_bytes(_LENGTH_BYTES, 'little') + text
  starts = {name: len(raw) + offsets[name][0] for name in specs}
  return Header(raw, dict(specs), starts, dict(metadata), len(raw) + end)


def nbytes(spec: jax.ShapeDtypeStruct) -> int:
  return math.prod(spec.shape) * spec.dtype.itemsize


def _parse(text: bytes) -> dict[str, Any]:
  """JSON in which no name is given twice: readers would disagree on it."""

  def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
      names = [name for name, _ in pairs]
      twice = next(name for name in names if names.count(name) > 1)
      raise ValueError(f'the name {twice!r} is there twice')
    return entries

  try:
    parsed = json.loads(text, object_pairs_hook=unique)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error
  if not isinstance(parsed, dict):
    raise ValueError('not an object')
  return parsed


def _parse_entry(
  entry: Mapping[str, Any],
) -> tuple[str, tuple[int, ...], tuple[int, int]]:
  """The dtype's name, the shape, and the first byte and the one past the end.

  Raises:
    ValueError, KeyError, TypeError: the entry is malformed.
  """
  start, stop = entry['data_offsets']
  numbers = [*entry['shape'], start, stop]
  if {*map(type, numbers)} != {int} or min(numbers) < 0:
    raise ValueError(f'{numbers} should be whole numbers of 0 or more')
  return str(entry['dtype']), tuple(entry['shape']), (start, stop)


def _demand_tiled(
  file: epath.Path,
  specs: Mapping[str, jax.ShapeDtypeStruct],
  offsets: Mapping[str, tuple[int, int]],
) -> int:
  """The bytes of all tensors.

  Raises:
    ValueError: they do not fill the data, each byte once.
  """
  end = 0
  for name in sorted(offsets, key=offsets.__getitem__):
    (start, stop), spec = offsets[name], specs[name]
    if start != end or stop - start != nbytes(spec):
      raise _damaged(
        file,
        f'the tensor {name!r} ({spec.dtype}{list(spec.shape)}, {nbytes(spec)}'
        f' bytes) lies in bytes {start} to {stop}, and the ones before it end'
        f' at {end}',
      )
    end = stop
  return end


def _damaged(file: epath.Path, why: str) -> ValueError:
  return ValueError(
    f'{file} is damaged or cut off: {why}. Restore it from a copy.'
  )
