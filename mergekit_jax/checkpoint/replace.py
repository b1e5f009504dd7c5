"""Putting a finished directory in its place, and clearing up after failures.

In a job of several processes only the first touches the directories.
"""

from collections.abc import Iterable
import pathlib

from etils import epath

from mergekit_jax.checkpoint import (
  companions,
  files,
  locks,
  orbax_layout,
  remote,
  safetensors_layout,
)

# In a stage: what it is to become, where that is made on a local disk, and the
# notes that nothing of it is missing and that what lay at the output was moved
# aside.
PLAN = 'plan.json'
CHECKPOINT = 'checkpoint'
COMPLETE = 'complete'
REPLACED = 'replaced'

# What there may be beside an output: its stage, and what it has replaced.
KINDS = ('tmp', 'old')

_MAKES_A_CHECKPOINT = orbax_layout.ITEM_METADATA


def check_destination(path: epath.Path, overwrite: bool, resume: bool) -> None:
  """Raises FileExistsError if `path` is taken and may not be replaced.

  With `resume` it may be taken by what was put there from the stage beside it.
  An empty directory is free.
  """
  if not path.exists() or _is_begun(path) or (resume and is_published(path)):
    return
  if remote.is_local(path) and is_empty(path):
    return
  if not remote.is_local(path):
    raise FileExistsError(
      f'{path} exists. Objects cannot be replaced all at once, so overwrite is'
      ' not for object stores. Give another path, or delete it yourself.'
    )
  if not overwrite:
    raise FileExistsError(
      f'{path} exists. Give another path, or pass overwrite=True (--overwrite):'
      ' it is then replaced once the new one is complete.'
    )
  # A mistyped path must not cost somebody a home directory.
  if found := what_else(path):
    raise FileExistsError(
      f'{path} exists and is not a checkpoint and nothing else (found '
      f'{found}), so it is not replaced. Give another path, or delete it '
      'yourself.'
    )


def is_empty(path: epath.Path) -> bool:
  return path.is_dir() and not any(path.iterdir())


def what_else(path: epath.Path) -> str:
  """What keeps a directory from being replaced as a whole; '' if nothing.

  That is the first thing that is no part of a checkpoint, or what there is in
  place of one.
  """
  try:
    if path.is_dir() and (found := safetensors_layout.find_shards(path)):
      return _beside_shards(path, *found)
    return orbax_layout.what_else(path)
  except ValueError:
    return 'one of which it cannot be told what belongs to it'


def is_published(path: epath.Path) -> bool:
  """Whether what is at `path` was put there from the stage beside it.

  The stages of several outputs stay until the last one is in its place.
  """
  stage = beside(path, 'tmp')
  if not (stage / PLAN).exists() or not (stage / COMPLETE).exists():
    return False
  if isinstance(path, remote.RemotePath):
    return _makes_a_checkpoint(path)
  moved = path.is_dir() and not (stage / CHECKPOINT).exists()
  # Something else may lie there by now.
  recorded = (stage / COMPLETE).read_text().splitlines()
  return moved and set(recorded) <= set(identity(path).splitlines())


def identity(path: epath.Path) -> str:
  """What a local directory keeps when it is moved, a line an entry of it."""
  entries = sorted(pathlib.Path(path).iterdir())
  stats = [entry.lstat() for entry in entries]
  return '\n'.join(
    # Names need not be text that can be written.
    f'{stat.st_ino} {stat.st_mtime_ns} {entry.name!a}'
    for entry, stat in zip(entries, stats, strict=True)
  )


def _is_begun(path: epath.Path) -> bool:
  """Whether objects at `path` are but what a killed merge left there."""
  if not isinstance(path, remote.RemotePath):
    return False
  # The directory alone says nothing: it is there before one looks here again.
  begun = (beside(path, 'tmp') / PLAN).exists()
  return begun and not _makes_a_checkpoint(path)


def _makes_a_checkpoint(path: remote.RemotePath) -> bool:
  return any(file.name == _MAKES_A_CHECKPOINT for file in path.walk_files())


def _beside_shards(
  path: epath.Path, shards: Iterable[epath.Path], index: str
) -> str:
  """The first thing beside a safetensors checkpoint that is no part of it.

  Such a checkpoint is known by the names of its files only, and people download
  one into a directory of other things.
  """
  own = {shard.name for shard in shards} | {index}
  record = companions.read_record(path)
  others = (
    name
    for name, file in companions.entries(path)
    if name not in own and not companions.belongs(name, file, record)
  )
  return next(others, '')


def beside(path: epath.Path, kind: str) -> epath.Path:
  """A name next to `path`, on the same file system, so that a move is one."""
  return path.parent / f'{path.name}.mergekit-{kind}'


def is_beside(path: epath.Path) -> bool:
  """Whether a path is, or lies in, what may be beside some output."""
  endings = tuple(f'.mergekit-{kind}' for kind in KINDS)
  return any(part.endswith(endings) for part in path.parts)


def is_unfinished(path: epath.Path) -> bool:
  """Whether the writer of a checkpoint at `path` can go on with what is there.

  Writers do so in directories that are called -tmp. Those of an item and of the
  step around it get their names one after the other, and what has its name is
  not written to any more.
  """
  begun, holding_arrays = _written(path)
  return bool(begun) and all(each.endswith('-tmp') for each in holding_arrays)


def is_finished(path: epath.Path) -> bool:
  """Whether the writer of a checkpoint at `path` was done with it.

  It gives it its name when all of it is on the disk.
  """
  begun, holding_arrays = _written(path)
  return not begun and bool(holding_arrays)


def _written(path: epath.Path) -> tuple[set[str], set[str]]:
  """What writers call -tmp, and the directories that arrays lie in."""
  parent, name = pathlib.Path(path.parent), path.name
  begun = {*parent.glob(f'{name}*-tmp'), *parent.glob(f'{name}/*-tmp')}
  holding_arrays = {
    file.parent.name
    for levels in ('', '*/', '*/*/')
    for mark in (_MAKES_A_CHECKPOINT, f'*{safetensors_layout.SUFFIX}')
    for file in parent.glob(f'{name}*/{levels}{mark}')
  }
  return {each.name for each in begun}, holding_arrays


def publish(new: epath.Path, path: epath.Path, overwrite: bool) -> None:
  """Puts the finished checkpoint `new` at `path`.

  A local one, which is all on the disk, is moved. With `overwrite` what was at
  `path` is moved aside before: if the process dies in between, both lie
  complete beside `path`, and if the power fails, there is one or the other.
  Without, the system refuses to move it onto anything with content. To an
  object store the files of `new` are copied, and what makes the objects there a
  checkpoint comes last: until then nobody takes them for one.
  """
  if not remote.is_local(path):
    small = [f for f in pathlib.Path(new).rglob('*') if f.is_file()]
    for file in sorted(small, key=lambda f: f.name == _MAKES_A_CHECKPOINT):
      (path / file.relative_to(new)).write_bytes(file.read_bytes())
    return
  old = beside(path, 'old')
  if overwrite and path.exists():
    remove_replaced(path)
    # Before it is so: a resume, which need not overwrite any more, removes it.
    files.write_whole(beside(path, 'tmp') / REPLACED, '')
    path.rename(old)
  if is_empty(path):
    path.rmdir()
  new.rename(path)
  files.sync(path.parent)


def remove_replaced(path: epath.Path) -> None:
  """Removes what was moved aside for what is at `path` now, if anything is.

  Raises:
    OSError: it cannot be removed.
  """
  old = beside(path, 'old')
  try:
    if path.exists():
      remove(old)
  except OSError as error:
    raise OSError(
      f'{path} was replaced and is complete, but what it held before, {old}, '
      f'could not be removed: {error}. Nothing needs it any more: delete it '
      'yourself, after chmod -R u+w if it is write-protected.'
    ) from error


def remove(path: epath.Path) -> None:
  if path.exists():
    path.rmtree()


def clear(path: epath.Path, *kept: str) -> None:
  """Removes what a directory holds, but for entries of these names."""
  for child in path.iterdir() if path.exists() else ():
    if child.name not in kept:
      child.rmtree() if child.is_dir() else child.unlink()


def clear_complete(stage: epath.Path) -> None:
  """Removes what the stage of an output holds that is in its place."""
  # Killed meanwhile, the same merge must find that it is complete. The lock
  # keeps others away to the end.
  clear(stage, locks.NAME, PLAN, COMPLETE)
  clear(stage, locks.NAME)
  clear(stage)
