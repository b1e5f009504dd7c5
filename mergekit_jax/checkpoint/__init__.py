"""Reading and writing checkpoints of every format through one interface."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import os
import re
from typing import Any

from etils import epath, epy

from mergekit_jax.checkpoint import (
  orbax_layout,
  remote,
  replace,
  safetensors,
  safetensors_layout,
)
from mergekit_jax.checkpoint.safetensors_write import write_safetensors
from mergekit_jax.checkpoint.source import Checkpoint
from mergekit_jax.checkpoint.writer import Write

# Orbax takes half as long to import as JAX, and not every merge needs it.
with epy.lazy_imports():
  from mergekit_jax.checkpoint import orbax, orbax_write

__all__ = ['FORMATS', 'Checkpoint', 'open_checkpoint', 'write_checkpoint']

FORMATS = ('orbax', 'safetensors')
# As flax wrote them before Orbax, and as Hugging Face keeps flax models.
_MSGPACK = re.compile(r'checkpoint_\d+|.*\.msgpack')
_STEP_OF_TRAINER = re.compile(r'checkpoint-(\d+)')


def open_checkpoint(path: epath.PathLike) -> Checkpoint:
  """Opens a checkpoint for reading; its weights are not read.

  Args:
    path: an Orbax checkpoint (a flat save, a CheckpointManager's directory,
      one of its steps or items, a v1 save) or a safetensors checkpoint (one
      file, or a directory with one file or with shards and their index).

  Returns:
    The checkpoint, whatever its format.

  Raises:
    FileNotFoundError: there is nothing at `path`.
    ValueError: there is no supported checkpoint at `path`, or it is damaged.
    OSError: it may not be read, or it is remote and cannot be reached.
  """
  path = remote.as_path(path)
  if remote.is_local(path):
    _demand_permission(path)
  if not path.exists():
    raise FileNotFoundError(_nothing_there(path))
  if found := orbax_layout.find_item(path):
    return orbax.OrbaxCheckpoint(path, *found)
  if found := safetensors_layout.find_shards(path):
    return safetensors.SafetensorsCheckpoint(path, *found)
  raise ValueError(_not_a_checkpoint(path))


def write_checkpoint(
  path: epath.PathLike,
  specs: Any,
  like: Checkpoint,
  produce: Callable[[Write], None],
  *,
  format: str | None = None,
  shard_size: int | str | None = None,
  zarr3: bool | None = None,
  compression: str | None = None,
  chunks: Mapping[str, Sequence[int]] | None = None,
  metadata: Mapping[str, Any] | None = None,
  arrays_at: epath.Path | None = None,
) -> None:
  """Writes a checkpoint that is like another one, box by box.

  Converting renames nothing: a safetensors tensor is called by the path that
  its array has in Orbax. In Orbax the path is a tree again, of dictionaries.

  Args:
    path: directory of the new checkpoint; it must not exist.
    specs: the tree to write: `like.tree` or a part of it, with specs.
    like: the checkpoint whose layout and metadata are kept.
    produce: see `orbax_write.write_orbax` and `write_safetensors`.
    format: one of `FORMATS`; None keeps the one of `like`.
    shard_size: for safetensors, see `write_safetensors`.
    zarr3: for Orbax, see `orbax_write.write_orbax`.
    compression: for Orbax, see `orbax_write.write_orbax`.
    chunks: for Orbax, see `orbax_write.write_orbax`.
    metadata: custom metadata, added to that of `like`.
    arrays_at: for Orbax, see `orbax_write.write_orbax`.

  Raises:
    ValueError: the format cannot hold the tree.
    BaseException: whatever `produce` raises.
  """
  if (format or like.format) == 'safetensors':
    write_safetensors(
      path, specs, like, produce, shard_size=shard_size, metadata=metadata
    )
    return
  orbax_write.write_orbax(
    path,
    specs if like.format == 'orbax' else _nested(specs),
    like.layout,
    produce,
    zarr3=zarr3,
    compression=compression,
    chunks=chunks,
    metadata={**like.metadata, **(metadata or {})},
    arrays_at=arrays_at,
  )


def _demand_permission(path: epath.Path) -> None:
  """Raises PermissionError if it may not be told what lies at a path.

  To `exists` there is nothing then.
  """
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    try:
      os.stat(path / orbax_layout.ITEM_METADATA)
    except PermissionError as error:
      raise PermissionError(
        f'Access to {path} was denied. It takes permission to enter it and the '
        'directories above it: see to that, or give a copy.'
      ) from error


def _nothing_there(path: epath.Path) -> str:
  if begun := _begun(path):
    return begun
  if beside := _beside(path):
    return f'There is no checkpoint at {path}, but {beside}.'
  return (
    f'There is no checkpoint at {path}. Names of models on a hub are not '
    'looked up: give a directory, or s3:// or gs://.'
  )


def _beside(path: epath.Path) -> str:
  """Which steps or items are there in place of one; '' if none are."""
  if not remote.is_local(path) or not path.parent.is_dir():
    return ''
  finders = {
    'step': orbax_layout.steps_beside,
    'item': orbax_layout.items_beside,
  }
  for kind, find in finders.items():
    # What cannot be looked at is no hint.
    with contextlib.suppress(OSError, ValueError):
      if names := find(path):
        kinds = kind if len(names) == 1 else f'{kind}s'
        listed = ('…, ' if len(names) > 8 else '') + ', '.join(names[-8:])
        return f'{path.parent} has the {kinds} {listed}'
  return ''


def _begun(path: epath.Path) -> str:
  """That a merge into a path is unfinished; '' if none is."""
  stage = replace.beside(remote.real_path(path), 'tmp')
  with contextlib.suppress(OSError):  # which is said of the path, if at all
    if stage.exists():
      return (
        f'There is no checkpoint at {path} yet: an unfinished merge lies in '
        f'{stage}. The same merge, started again, finishes it.'
      )
  return ''


def _nested(flat: Mapping[str, Any]) -> Mapping[str, Any]:
  """{'a/b': x} -> {'a': {'b': x}}; as it was if that is no tree."""
  tree: dict[str, Any] = {}
  for name, spec in flat.items():
    *parents, last = name.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
      if not isinstance(node, dict):
        return flat
    if last in node or '' in (*parents, last):
      return flat
    node[last] = spec
  return tree


def _not_a_checkpoint(path: epath.Path) -> str:
  if begun := _begun(path):
    return begun
  if path.name.endswith(safetensors_layout.INDEX_SUFFIX):
    return (
      f'{path} lists the files of a checkpoint. Give its directory: '
      f'{path.parent}.'
    )
  files = [path]
  if path.is_dir():
    files = sorted(path.iterdir())
  names = [file.name for file in files]
  pickled = [n for n in names if n.endswith(('.bin', '.pt', '.pth', '.pkl'))]
  if pickled:
    return (
      f'{path} is a PyTorch checkpoint ({pickled[0]}). Pickled weights are not'
      ' supported, as reading them runs code from the file; convert it to'
      ' safetensors.'
    )
  packed = [
    file.name
    for file in files
    if _MSGPACK.fullmatch(file.name) and not file.is_dir()
  ]
  if packed:
    return (
      f'{path} is a flax msgpack file ({packed[0]}). Restore it with flax and'
      ' save it with Orbax.'
    )
  if below := _may_be_below(files):
    return (
      f'{path} is not a checkpoint, but {" and ".join(below)} in it may be. '
      f'Give that path, such as {path / below[-1]}.'
    )
  listed = ', '.join(names[:8]) + (', …' if len(names) > 8 else '')
  return (
    f'{path} is not a checkpoint. Looked for an Orbax item (a directory with'
    f' {orbax_layout.ITEM_METADATA}, here, in <item>/ or in <step>/<item>/)'
    f' and for *.safetensors; found: {listed or "nothing"}.'
  )


def _may_be_below(files: Sequence[epath.Path]) -> list[str]:
  """Where training programs and Hugging Face's cache keep models, below."""
  below = [f.name for f in files if f.name == 'checkpoints' and f.is_dir()]
  for file in files:
    if file.name == 'snapshots' and file.is_dir():
      snapshots = sorted(each for each in file.iterdir() if each.is_dir())
      below += [f'{file.name}/{each.name}' for each in snapshots]
  steps = {
    int(step[1]): file.name
    for file in files
    if (step := _STEP_OF_TRAINER.fullmatch(file.name)) and file.is_dir()
  }
  return below + [steps[number] for number in sorted(steps)]
