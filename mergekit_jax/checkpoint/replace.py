"""Putting a finished directory in its place, and clearing up after failures.

In a job of several processes only the first touches the directories.
"""

from collections.abc import Callable

from etils import epath
import orbax.checkpoint as ocp

from mergekit_jax.checkpoint import orbax_layout, safetensors_layout


def check_destination(path: epath.Path, overwrite: bool) -> None:
  """Raises FileExistsError if `path` exists and may not be replaced."""
  if not path.exists():
    return
  if not overwrite:
    raise FileExistsError(
      f'{path} exists. Give another path, or overwrite=True to replace it.'
    )
  # A mistyped path must not cost somebody a home directory.
  if orbax_layout.find_item(path) is None and not _is_safetensors(path):
    raise FileExistsError(
      f'{path} exists and is not a checkpoint and nothing else, so it is not'
      ' replaced. Give another path, or delete it yourself.'
    )


def _is_safetensors(path: epath.Path) -> bool:
  """Whether a directory holds a safetensors checkpoint and nothing else.

  Such a checkpoint is known by the names of its files only, and people download
  one into a directory of other things.
  """
  if not path.is_dir() or not safetensors_layout.find_shards(path):
    return False
  return all(
    safetensors_layout.belongs(file.name) and not file.is_dir()
    for file in path.iterdir()
  )


def beside(path: epath.Path, kind: str) -> epath.Path:
  """A name next to `path`, on the same file system, so that a move is one."""
  return path.parent / f'{path.name}.mergekit-{kind}'


def make_empty(path: epath.Path) -> None:
  """Makes an empty directory, whatever an earlier attempt left there."""
  remove(path)
  path.mkdir(parents=True)


def move(new: epath.Path, path: epath.Path) -> None:
  """Moves `new` to `path`; what was at `path` is deleted after that.

  If the process dies in between, both lie complete beside `path`.
  """
  old = beside(path, 'old')
  if path.exists():
    remove(old)
    path.rename(old)
  new.rename(path)
  remove(old)


def remove(path: epath.Path) -> None:
  if path.exists():
    path.rmtree()


def on_primary(action: Callable[[], None]) -> None:
  """Runs `action` on the first process while the others wait."""
  if ocp.multihost.is_primary_host(0):
    action()
  ocp.multihost.sync_global_processes('mergekit_jax:on_primary')
