"""Whether what journals say is written still lies in an unfinished checkpoint.

Somebody may have deleted some of it between a kill and the resume. No weights
are read: only the files that they lie in are looked for.
"""

from collections.abc import Collection, Iterator, Sequence
import itertools
import pathlib
from typing import Any

from etils import epath

from mergekit_jax.checkpoint import (
  journal,
  ocdbt_values,
  orbax_layout,
  safetensors_layout,
)

# Path of an array, origin and shape of a part of it.
_Part = tuple[str, Sequence[int], Sequence[int]]


def is_there(
  checkpoint: epath.Path, journals: Sequence[journal.Journal]
) -> bool:
  """Whether all parts that journals name are there.

  Args:
    checkpoint: where the checkpoint is made on a local disk; what its writer
      has not finished has a name that begins like this one.
    journals: those of all processes, in order.
  """
  parts: list[list[_Part]] = [
    [
      (facts['path'], origin, shape)
      for facts in each.values()
      for origin, shape, _ in facts['parts']
    ]
    for each in journals
  ]
  if not any(parts):
    return True
  parent, name = pathlib.Path(checkpoint.parent), checkpoint.name
  try:
    if files := [*parent.glob(f'{name}*/*{safetensors_layout.SUFFIX}')]:
      return _in_files(files, parts)
    items = parent.glob(f'{name}*/**/{orbax_layout.ARRAY_METADATAS}')
    return any(_in_item(found.parent, parts) for found in items)
  except (KeyError, ValueError, EOFError, FileNotFoundError):
    return False


def _in_files(
  files: Sequence[pathlib.Path], parts: Sequence[Sequence[_Part]]
) -> bool:
  """Whether safetensors files, each of its whole size, hold all tensors."""
  held = set[str]()
  for file in files:
    held.update(safetensors_layout.read_header(epath.Path(file)).specs)
  return all(path in held for path, *_ in itertools.chain(*parts))


def _in_item(item: pathlib.Path, parts: Sequence[Sequence[_Part]]) -> bool:
  """Whether an item of Orbax holds all chunks."""
  # Of a path it cannot be told which of its slashes are dots in Orbax's name.
  arrays = {
    array['param_name'].replace('/', '.'): array
    for array in orbax_layout.array_metadata(epath.Path(item))
  }
  for process, own in enumerate(parts):
    # A process that has written nothing has no database.
    stored = _stored(item, process) if own else ()
    for path, origin, shape in own:
      array = arrays[path.replace('/', '.')]
      if not all(
        any(key in stored for key in keys)
        for keys in _keys(array, origin, shape)
      ):
        return False
  return True


def _keys(
  array: Any, origin: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[str, str]]:
  """What each chunk that a box touches is called in zarr2 and in zarr3."""
  name, chunk = array['param_name'], array['write_shape']
  touched = (
    range(start // length, -(-(start + size) // length))
    for start, size, length in zip(origin, shape, chunk, strict=True)
  )
  for cell in itertools.product(*touched):
    numbers = [str(i) for i in cell]
    yield f'{name}/{".".join(numbers) or "0"}', '/'.join([name, 'c', *numbers])


def _stored(item: pathlib.Path, process: int) -> Collection[str]:
  """The keys of what a process has stored.

  Raises:
    KeyError, ValueError, EOFError, FileNotFoundError: a file of an OCDBT
      database is missing or damaged.
  """
  if not any(item.glob('ocdbt.process_*')):
    return {
      file.relative_to(item).as_posix()
      for file in item.rglob('*')
      if file.is_file()
    }
  # What each process has for itself is merged when the item gets its name.
  merged = not item.name.endswith('-tmp')
  database = item if merged else item / f'ocdbt.process_{process}'
  places = ocdbt_values.places(epath.Path(database))
  for place in places.values():
    if not isinstance(place, bytes):
      place.demand_there()
  return {key.decode() for key in places}
