"""Finds the one item of an Orbax checkpoint that holds the parameters.

Orbax lays a PyTree down in an item directory, which is known by its
`_METADATA`. A flat save is the item directory itself; CheckpointManager writes
`<step>/<item>` and the v1 API `<item>`. People paste any of these.
"""

import json
import re
from typing import Any

from etils import epath
import orbax.checkpoint as ocp

ITEM_METADATA = '_METADATA'
STEP_METADATA = '_CHECKPOINT_METADATA'

# CheckpointManager can put a prefix before the number. Without the manager's
# directory at hand that is not enough to tell a step: `expert_1` may be a save.
_STEP_OF_MANAGER = re.compile(r'(?:.*_)?(\d+)')
_STEP = re.compile(r'\d+')
_PARAMETER_ROOTS = {'params', 'target', 'model', 'model_params'}
_PREFERRED_ITEMS = ('default', 'items', 'params', 'state', 'model')


def find_item(path: epath.Path) -> tuple[epath.Path, str] | None:
  """Finds the item directory behind any path a user may paste.

  Args:
    path: an item directory, a step, a CheckpointManager's directory, or the
      directory of a flat or a v1 save.

  Returns:
    The item directory and its path relative to the top of the checkpoint (see
    `OrbaxLayout.item`), or None if there is no Orbax checkpoint.

  Raises:
    ValueError: an unfinished save, or several items and none of them is the
      obvious one.
  """
  if not path.is_dir():
    return None
  if '.orbax-checkpoint-tmp' in path.name:
    raise ValueError(
      f'{path} is a save that was not finished. Give a finished checkpoint.'
    )
  if _is_item(path):
    return path, _name_from_parents(path)
  if items := _items(path):
    item = _choose(items)
    return item, _name_from_parents(item)
  for step in _steps_newest_first(path):
    if _is_item(step):
      return step, ''
    if items := _items(step):
      item = _choose(items)
      return item, f'{step.name}/{item.name}'
  return None


def random_keys(item: epath.Path) -> dict[str, str]:
  """Which arrays are JAX random keys, stored as the words of these.

  Args:
    item: the item directory.

  Returns:
    The implementations by Orbax's names of the arrays.
  """
  # Each process writes one of these files, and all say the same.
  file = item / 'array_metadatas' / 'process_0'
  if not file.exists():
    return {}
  arrays = [
    entry['array_metadata'] for entry in read_json(file)['array_metadatas']
  ]
  return {
    array['param_name']: extra['random_key_impl']
    for array in arrays
    if 'random_key_impl' in (extra := array.get('ext_metadata') or {})
  }


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a metadata file.

  Raises:
    ValueError: the file is damaged.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f'{path} is damaged ({error}). Restore it from a copy.'
    ) from error


def _is_item(path: epath.Path) -> bool:
  return (path / ITEM_METADATA).exists()


def _items(path: epath.Path) -> list[epath.Path]:
  # A flat save has step metadata of its own: a directory of those is no step.
  return sorted(
    child
    for child in path.iterdir()
    if _is_item(child) and not (child / STEP_METADATA).exists()
  )


def _steps_newest_first(path: epath.Path) -> list[epath.Path]:
  steps = {}
  for child in path.iterdir():
    if match := _STEP_OF_MANAGER.fullmatch(child.name):
      if child.is_dir() and ocp.utils.is_checkpoint_finalized(child):
        steps[int(match[1]), child.name] = child
  return [steps[key] for key in sorted(steps, reverse=True)]


def _name_from_parents(item: epath.Path) -> str:
  """The relative name of an item that was given without its parents."""
  step = item.parent
  # Only a checkpoint's top or step directory has this file; in an item
  # directory it means a flat save.
  if (item / STEP_METADATA).exists():
    return ''
  is_step = _STEP.fullmatch(step.name) is not None
  if (step / STEP_METADATA).exists():
    handlers = read_json(step / STEP_METADATA).get('item_handlers')
    if not isinstance(handlers, dict) or item.name not in handlers:
      return ''
  elif not is_step:
    return ''
  return f'{step.name}/{item.name}' if is_step else item.name


def _choose(items: list[epath.Path]) -> epath.Path:
  if len(items) == 1:
    return items[0]
  candidates = {item.name: item for item in items if _holds_parameters(item)}
  if len(candidates) == 1:
    return next(iter(candidates.values()))
  for name in _PREFERRED_ITEMS:
    if name in candidates:
      return candidates[name]
  names = [item.name for item in items]
  raise ValueError(
    f'{items[0].parent} holds the items {names}, and none of them is clearly'
    ' the one with the parameters. Give the path of the item itself:'
    ' <path>/<step>/<item>.'
  )


def _holds_parameters(item: epath.Path) -> bool:
  leaves = read_json(item / ITEM_METADATA)['tree_metadata'].values()
  roots = {leaf['key_metadata'][0]['key'] for leaf in leaves}
  return item.name in _PARAMETER_ROOTS or bool(roots & _PARAMETER_ROOTS)
