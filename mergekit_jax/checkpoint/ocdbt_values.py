"""Where OCDBT keeps its values on a local disk: file, offset and length.

TensorStore reads a part of a stored chunk by mapping its file, and gives the
mapping up again, which costs more than the reading. With the place known, the
bytes can be read straight into the buffer that they are wanted in.
"""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

from etils import epath
import tensorstore as ts


@dataclasses.dataclass(frozen=True)
class Extent:
  """A run of bytes in a file."""

  file: str
  offset: int
  length: int

  def demand_there(self) -> None:
    """Raises FileNotFoundError or EOFError if the file does not hold it."""
    if os.path.getsize(self.file) < self.offset + self.length:
      raise EOFError(f'{self.file} is cut off.')


def places(directory: epath.Path) -> dict[bytes, Extent | bytes]:
  """Where each key's value lies; short values, which lie in the tree, as such.

  Args:
    directory: the directory of an OCDBT database on a local disk.

  Raises:
    KeyError, ValueError: the database is of a kind that this does not know.
  """
  store = ts.KvStore.open(
    {'driver': 'file', 'path': f'{directory}/'},
    context=ts.Context({'cache_pool': {'total_bytes_limit': 2**24}}),
  ).result()
  manifest: Any = ts.ocdbt.dump(store).result()
  latest = manifest['versions'][-1]['root']
  return dict(_entries(store, latest['location'], b'', f'{directory}/'))


def _entries(
  store: ts.KvStore, location: str, prefix: bytes, directory: str
) -> Iterator[tuple[bytes, Extent | bytes]]:
  """The entries of a node of the B-tree and of all below it."""
  node: Any = ts.ocdbt.dump(store, node=location).result()
  for entry in node['entries']:
    key = prefix + entry['key']
    if 'inline_value' in entry:
      yield key, entry['inline_value']
    elif 'indirect_value' in entry:
      yield key, _extent(entry['indirect_value'], directory)
    else:
      below = prefix + entry['subtree_common_prefix']
      yield from _entries(store, entry['location'], below, directory)


def _extent(value: str, directory: str) -> Extent:
  """Reads 'value:ocdbt.process_0/:d/f9a1…:8388608:4096'."""
  kind, base, name, offset, length = value.split(':')
  if kind != 'value':
    raise ValueError(f'{value!r} is not the place of a value.')
  return Extent(f'{directory}{base}{name}', int(offset), int(length))
