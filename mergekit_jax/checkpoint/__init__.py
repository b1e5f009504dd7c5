"""Reading checkpoints of every supported format through one interface."""

from etils import epath

from mergekit_jax.checkpoint import (
  orbax,
  orbax_layout,
  safetensors,
  safetensors_layout,
)
from mergekit_jax.checkpoint.source import Checkpoint

__all__ = ['Checkpoint', 'open_checkpoint']


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
  """
  path = epath.Path(path)
  if not path.exists():
    raise FileNotFoundError(f'There is no checkpoint at {path}.')
  if found := orbax_layout.find_item(path):
    return orbax.OrbaxCheckpoint(path, *found)
  if shards := safetensors_layout.find_shards(path):
    return safetensors.SafetensorsCheckpoint(path, shards)
  raise ValueError(_not_a_checkpoint(path))


def _not_a_checkpoint(path: epath.Path) -> str:
  names = [path.name]
  if path.is_dir():
    names = sorted(child.name for child in path.iterdir())
  pickled = [n for n in names if n.endswith(('.bin', '.pt', '.pth', '.pkl'))]
  if pickled:
    return (
      f'{path} is a PyTorch checkpoint ({pickled[0]}). Pickled weights are not'
      ' supported, as reading them runs code from the file; convert it to'
      ' safetensors.'
    )
  listed = ', '.join(names[:8]) + (', …' if len(names) > 8 else '')
  return (
    f'{path} is not a checkpoint. Looked for an Orbax item (a directory with'
    f' {orbax_layout.ITEM_METADATA}, here, in <item>/ or in <step>/<item>/)'
    f' and for *.safetensors; found: {listed or "nothing"}.'
  )
