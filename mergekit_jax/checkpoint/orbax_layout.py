"""Finds the one item of an Orbax checkpoint that holds the parameters.

Orbax lays a PyTree down in an item directory, which is known by its
`_METADATA`. A flat save is the item directory itself; CheckpointManager writes
`<step>/<item>` and the v1 API `<item>`. People paste any of these.
"""

import base64
from collections.abc import Callable
import json
import re
from typing import Any

from etils import epath, epy

with epy.lazy_imports():
  import orbax.checkpoint as ocp

ITEM_METADATA = '_METADATA'
STEP_METADATA = '_CHECKPOINT_METADATA'
ARRAY_METADATAS = 'array_metadatas'

# CheckpointManager can put a prefix before the number. Without the manager's
# directory at hand that is not enough to tell a step: `expert_1` may be a save.
_STEP_OF_MANAGER = re.compile(r'(.*_)?(\d+)')
_STEP = re.compile(r'\d+')
# v1 writes it to a save, and not to the steps of its managers.
_OF_V1_SAVE = 'orbax.checkpoint'
_OF_STEP = {STEP_METADATA, 'commit_success.txt'}
# What Orbax writes to an item beside arrays that have directories of their own.
_OF_ITEM = re.compile(
  '_METADATA|_CHECKPOINT_METADATA|_sharding|_strings.json|array_metadatas'
  r'|commit_success.txt|d|manifest.ocdbt|ocdbt.process_\d+'
)
# The file in which old versions kept small values. Many directories of people
# are called so too.
_OLD_VALUES = 'checkpoint'
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
  if is_unfinished(path):
    raise ValueError(
      f'{path} is a save that was not finished. Give a finished checkpoint.'
    )
  if _is_item(path):
    return path, _name_from_parents(path)
  if items := _items(path):
    item = _choose(items)
    return item, _name_from_parents(item)
  for step in _newest_first(_steps(path)):
    if _is_item(step):
      return step, ''
    if items := _items(step):
      item = _choose(items)
      return item, f'{step.name}/{item.name}'
  return None


def items_beside(item: epath.Path) -> list[str]:
  """The names of the other trees that were saved together with an item."""
  return [other.name for other in _items(item.parent) if other != item]


def is_unfinished(path: epath.Path) -> bool:
  """Whether it is called like a save that Orbax has not finished."""
  return '.orbax-checkpoint-tmp' in path.name


def is_part(path: epath.Path) -> bool:
  """Whether a directory is an item, a step or the top of a save.

  A CheckpointManager's is none: other things may lie beside the steps.
  """
  # Of objects this asks for two; to list what is there may take long.
  return any((path / name).is_file() for name in (ITEM_METADATA, STEP_METADATA))


def would_be_step(path: epath.Path) -> bool:
  """Whether a CheckpointManager of the directory around takes it for a step.

  Raises:
    ValueError: the metadata of a step beside it is damaged.
  """
  return bool(steps_beside(path))


def steps_beside(path: epath.Path) -> list[str]:
  """The names of the steps among which a CheckpointManager would count it.

  Raises:
    ValueError: the metadata of a step beside it is damaged.
  """
  name = _STEP_OF_MANAGER.fullmatch(path.name)
  if name is None or not path.parent.is_dir():
    return []
  steps = [
    child
    for child in path.parent.iterdir()
    if (other := _STEP_OF_MANAGER.fullmatch(child.name))
    and other[1] == name[1]
    and child != path
    and _is_step(child)
    and not (name[1] and _has_its_own_name(child))
  ]
  return [step.name for step in reversed(_newest_first(steps))]


def random_keys(item: epath.Path) -> dict[str, str]:
  """Which arrays are JAX random keys, stored as the words of these.

  Args:
    item: the item directory.

  Returns:
    The implementations by Orbax's names of the arrays.
  """
  return {
    array['param_name']: extra['random_key_impl']
    for array in array_metadata(item)
    if 'random_key_impl' in (extra := array.get('ext_metadata') or {})
  }


def array_metadata(item: epath.Path) -> list[dict[str, Any]]:
  """What Orbax noted of the arrays as they were saved, if it did."""
  # Each process writes one of these files, and all say the same.
  file = item / ARRAY_METADATAS / 'process_0'
  if not file.exists():
    return []
  entries = read_json(file)[ARRAY_METADATAS]
  return [entry['array_metadata'] for entry in entries]


def shardings(item: epath.Path) -> dict[str, str]:
  """What the arrays are restored with where nobody says anything else.

  Args:
    item: the item directory.

  Returns:
    Shardings as Orbax writes them down, by its names of the arrays.
  """
  file = item / '_sharding'
  if not file.exists():
    return {}
  return {
    base64.urlsafe_b64decode(name).decode(): text
    for name, text in read_json(file).items()
  }


def what_else(path: epath.Path) -> str:
  """What keeps a directory from being one item and what a merge writes with it.

  That is the item itself, `<item>` or `<step>/<item>`. `find_item` is content
  with less: it looks for a checkpoint among anything else.

  Returns:
    The first thing that is in the way, relative to the directory, or that there
    is no item; '' if nothing is.

  Raises:
    ValueError: its metadata is damaged.
  """
  if not path.is_dir():
    return 'a file'
  names = {child.name for child in path.iterdir()}
  if ITEM_METADATA in names:
    others = names - _array_directories(path)
    if (path / _OLD_VALUES).is_file():
      others -= {_OLD_VALUES}
    return min((x for x in others if not _OF_ITEM.fullmatch(x)), default='')
  if STEP_METADATA in names:
    return _beside_one(names - _OF_STEP, path, _is_bare_item)
  return _beside_one(names, path, _is_step)


def _beside_one(
  names: set[str], parent: epath.Path, fits: Callable[[epath.Path], bool]
) -> str:
  """What is in the way of there being one name, which fits; see `what_else`."""
  if not names:
    return 'no item'
  one = min((name for name in names if fits(parent / name)), default='')
  if others := names - {one}:
    return min(others)
  inside = what_else(parent / one)
  return inside and f'{one}/{inside}'


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


def _is_bare_item(path: epath.Path) -> bool:
  # A flat save has step metadata of its own: a directory of those is no step.
  return _is_item(path) and not (path / STEP_METADATA).exists()


def _is_step(path: epath.Path) -> bool:
  return (
    _STEP_OF_MANAGER.fullmatch(path.name) is not None
    and (path / STEP_METADATA).exists()
    and not _is_item(path)
  )


def _has_its_own_name(step: epath.Path) -> bool:
  """Whether what is called like a step is a v1 save or the output of a merge.

  Both have items as a step has, and `model_1` and `model_2` are two of them.
  """
  metadata = read_json(step / STEP_METADATA).get('custom_metadata') or {}
  return (step / _OF_V1_SAVE).exists() or 'mergekit_jax' in metadata


def _items(path: epath.Path) -> list[epath.Path]:
  return sorted(filter(_is_bare_item, path.iterdir()))


def _array_directories(item: epath.Path) -> set[str]:
  """The names in an item of arrays that are stored without OCDBT."""
  leaves = read_json(item / ITEM_METADATA).get('tree_metadata', {}).values()
  arrays = (
    '.'.join(str(key['key']) for key in leaf['key_metadata']) for leaf in leaves
  )
  # A key with a slash in it is a directory more.
  return {array.partition('/')[0] for array in arrays}


def _steps(path: epath.Path) -> list[epath.Path]:
  """The steps of the one manager that keeps them in a directory.

  Raises:
    ValueError: they are called in several ways, and none of them is a number
      alone: `math_1` and `code_2` may be two models.
  """
  by_prefix: dict[str, list[epath.Path]] = {}
  for child in path.iterdir():
    if match := _STEP_OF_MANAGER.fullmatch(child.name):
      if child.is_dir() and ocp.utils.is_checkpoint_finalized(child):
        by_prefix.setdefault(match[1] or '', []).append(child)
  if len(by_prefix) > 1:
    by_prefix = {
      prefix: steps
      for prefix, steps in by_prefix.items()
      if any(_is_item(step) or _items(step) for step in steps)
    }
  if '' in by_prefix:
    return by_prefix['']
  if len(by_prefix) > 1:
    names = sorted(step.name for steps in by_prefix.values() for step in steps)
    raise ValueError(
      f'{path} holds {", ".join(names)}, which need not be steps of one model.'
      ' Give the path of the one that is meant.'
    )
  return [step for steps in by_prefix.values() for step in steps]


def _newest_first(steps: list[epath.Path]) -> list[epath.Path]:
  number = lambda step: int(step.name.rpartition('_')[2])
  return sorted(steps, key=number, reverse=True)


def _name_from_parents(item: epath.Path) -> str:
  """The relative name of an item that was given without its parents."""
  item = item.absolute()  # `.` has no name
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
  # An item that is one array has a leaf without keys.
  roots = {key['key'] for leaf in leaves for key in leaf['key_metadata'][:1]}
  return item.name in _PARAMETER_ROOTS or bool(roots & _PARAMETER_ROOTS)
