"""Where an output is made until it is complete.

`<output>.mergekit-tmp` beside it holds the plan it was begun with, and of every
process a journal of the units that are written. On a local disk it holds the
unfinished checkpoint too, which is moved to its place. Objects cannot be moved:
there the arrays are written where they are to stay, and the small files without
which they are no checkpoint come last.

A killed merge leaves the stage. The same merge, started again, finds it and
does what is missing: in an object store on other machines as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import json
import os
import tempfile
from typing import Any

from absl import logging
from etils import epath
import jax

from mergekit_jax import processes
from mergekit_jax.checkpoint import (
  begun,
  files,
  journal,
  locks,
  recorded,
  remote,
  replace,
)


class Stage:
  """The stage of one output, as one process sees it.

  Attributes:
    output: where the finished checkpoint is to lie.
    overwrite: whether what is there may be replaced.
    checkpoint: the local directory of the new checkpoint, not made yet.
    arrays: where its arrays are to be written, if that is an object store.
    done: what was recorded of each unit that all processes have written.
    published: whether the checkpoint is in its place.
    complete: whether it is all there, so that nothing is to be written.
  """

  def __init__(
    self,
    output: epath.Path,
    overwrite: bool,
    checkpoint: epath.Path,
    arrays: epath.Path | None,
    demand_ours: Callable[[], None],
  ):
    self.output = output
    self.overwrite = overwrite
    self.directory = replace.beside(output, 'tmp')
    self.checkpoint = checkpoint
    self.arrays = arrays
    self.demand_ours = demand_ours
    self.done: journal.Journal = {}
    self.published = self.complete = False
    self._journal: Any = None

  def open(self) -> None:
    """Reads what all processes have done, then begins to add to it."""
    self.published = replace.is_published(self.output)
    self.complete = self.published or self._is_sealed()
    journals = journal.read_all(self.directory)
    if len(journals) == jax.process_count():
      finished = set.intersection(*(set(each) for each in journals))
      own = journals[jax.process_index()]
      self.done = {unit: own[unit] for unit in sorted(finished)}
    # A shared file system may show them different things for a while.
    found = repr((self.published, self.complete, [*self.done]))
    processes.demand_agreement({f'what {self.directory} holds': found})
    self._journal = journal.Writer(
      self.directory, jax.process_index(), self.demand_ours
    )

  def record(self, unit: int, facts: Mapping[str, Any]) -> None:
    """Notes that this process has written its part of a unit."""
    self._journal.add(unit, facts)

  def demand_recorded(self, units: Collection[int]) -> None:
    """Raises OSError unless this process's journal holds all units.

    To be asked before the checkpoint is committed, as long as what is missing
    can be written again.
    """
    self._journal.flush()
    held = journal.read(self.directory, jax.process_index())
    if missing := set(units) - held.keys():
      raise OSError(
        f'{len(missing)} of {len(units)} units were written, but the journal '
        f'in {self.directory} has no complete line for them, so the report '
        'would lack them. Start the same merge again: it makes these again.'
      )

  def records(self) -> list[dict[str, Any]]:
    """What was recorded of every unit, with the parts of all processes."""
    self._journal.flush()
    processes.barrier('journals written')
    units: dict[int, dict[str, Any]] = {}
    for each in journal.read_all(self.directory):
      for number, facts in each.items():
        if number in units:
          parts = units[number]['parts'] + facts['parts']
          facts = {**units[number], 'parts': parts}
        units[number] = facts
    return [units[number] for number in sorted(units)]

  def discard(self) -> None:
    """Forgets what was written, so that nobody goes on with it."""
    self.close()
    if not self.complete:
      processes.on_primary(lambda: journal.remove_all(self.directory))

  def close(self) -> None:
    if self._journal is not None:
      self._journal.close()
      self._journal = None

  def seal(self) -> None:
    """Notes that the checkpoint is complete, once it is all on the disk."""
    if self.arrays is None:
      processes.on_primary(self.seal_here)
    self.complete = True

  def seal_here(self) -> None:
    """Does so, on the one process that calls it."""
    files.sync_all(self.checkpoint)
    files.write_whole(
      self.directory / replace.COMPLETE, replace.identity(self.checkpoint)
    )

  def _is_sealed(self) -> bool:
    return self.arrays is None and (self.directory / replace.COMPLETE).exists()

  def publish(self, report: Callable[[], object] = lambda: None) -> None:
    """Puts the complete checkpoint in its place, if it is not there yet.

    Args:
      report: writes what lies beside it; called just after, on one process. If
        it never comes to that a resume calls it.
    """
    self.close()
    if not self.complete:
      self.seal()
    processes.on_primary(lambda: self._publish(report))
    self.published = True

  def _publish(self, report: Callable[[], object]) -> None:
    self.demand_ours()
    if self.published:
      report()
      return
    try:
      # The merge may have taken hours since this was looked at.
      replace.check_destination(self.output, self.overwrite, resume=False)
    except FileExistsError as error:
      what_to_do = (
        f'The merge is complete in {self.directory}: move away what is at the '
        'output and start the same merge again, which puts it there.'
        if self.arrays is None
        else 'Its arrays may be mixed with those of this merge: delete it and '
        'start the same merge again.'
      )
      raise FileExistsError(
        f'{self.output} has appeared since this merge began, so it is not '
        f'touched. {what_to_do}'
      ) from error
    if self.arrays is not None:
      # Not before: until here it would have been taken for what has appeared.
      (self.directory / replace.COMPLETE).write_text('yes')
    replace.publish(self.checkpoint, self.output, self.overwrite)
    report()

  def clear_replaced(self) -> None:
    """Removes what lay at the output before, if it was replaced."""
    processes.on_primary(self._clear_replaced)

  def _clear_replaced(self) -> None:
    # A killed merge that had `overwrite` may have been the one that moved it.
    if self.overwrite or (self.directory / replace.REPLACED).exists():
      try:
        replace.remove_replaced(self.output)
      except OSError as error:
        # The merge is done all the same: nobody must go on with it.
        logging.error('%s', error)

  def remove(self) -> None:
    """Removes it, and the beginnings of arrays that lie in an object store."""
    if self.arrays is not None:
      # Not what somebody else has made a checkpoint meanwhile.
      replace.check_destination(self.arrays, overwrite=False, resume=False)
      replace.remove(self.arrays)
    replace.clear(self.directory)


@contextlib.contextmanager
def staged(
  output: epath.PathLike,
  plan: Mapping[str, Any],
  *,
  overwrite: bool,
  resume: bool,
) -> Iterator[Stage]:
  """Makes an output in a stage, and puts it in its place when it is complete.

  Args:
    output: where the finished checkpoint is to lie.
    plan: what decides the output bit by bit, by name, as JSON can hold it.
    overwrite: replace an output that exists, once the new one is complete; not
      in object stores.
    resume: continue the stage of a killed merge; else it is thrown away.

  Yields:
    The stage. If the body raises, or its output has been taken meanwhile, the
    stage stays for a resume if any unit was recorded, else it is removed;
    nothing that is taken for a checkpoint appears at `output`.

  Raises:
    FileExistsError: if the output exists, now or when it is to be put in its
      place, and may not be replaced.
    ValueError: if another merge into it is running, or one with another plan
      was left unfinished.
    OSError: if the output is remote and cannot be written, if what an earlier
      merge has replaced is there and cannot be removed, or if the first of
      several processes raises any of these: the others say what it said.
  """
  output = remote.as_path(output).absolute()
  replace.check_destination(output, overwrite, resume)
  directory = replace.beside(output, 'tmp')
  with contextlib.ExitStack() as stack:
    checkpoint, arrays = stack.enter_context(_workspace(output, directory))
    # A network disk keeps the file of a lock until that is closed.
    stack.callback(_remove_empty, directory)
    demand_ours = stack.enter_context(locks.held(directory))
    stage = Stage(output, overwrite, checkpoint, arrays, demand_ours)
    processes.on_primary(lambda: _prepare(stage, plan, resume))
    stage.open()
    try:
      if overwrite and arrays is None:
        # What cannot be removed would be in the way once all is merged.
        processes.on_primary(lambda: replace.remove_replaced(output))
      yield stage
      # The body does, to have several in place before a stage is gone.
      if not stage.published:
        stage.publish()
        stage.clear_replaced()
    except BaseException:
      _keep_or_remove(stage)
      raise
    processes.on_primary(lambda: replace.clear_complete(directory))


@contextlib.contextmanager
def _workspace(
  output: epath.Path, directory: epath.Path
) -> Iterator[tuple[epath.Path, epath.Path | None]]:
  """Where the checkpoint is written, and where its arrays are."""
  if remote.is_local(output):
    yield directory / replace.CHECKPOINT, None
    return
  # Each process writes the small files for itself; those of the first count.
  with tempfile.TemporaryDirectory(prefix='mergekit_jax.') as own:
    yield epath.Path(own) / replace.CHECKPOINT, output


def _prepare(stage: Stage, plan: Mapping[str, Any], resume: bool) -> None:
  """Writes the plan into a new stage, or compares it with the one there."""
  # Something may have appeared before the stage was ours.
  replace.check_destination(stage.output, stage.overwrite, resume)
  plan = json.loads(json.dumps(plan))
  file = stage.directory / replace.PLAN
  if resume and (then := begun.read(file)) is not None:
    begun.demand_same(stage.directory, then, plan)
    if _is_as_recorded(stage):
      return
    logging.warning(
      'What is in %s cannot be gone on with; the merge begins anew.',
      stage.directory,
    )
  # They must not outlive what they speak of, nor the plan the journals: killed
  # meanwhile, the next one begins anew.
  file.unlink(missing_ok=True)
  journal.remove_all(stage.directory)
  if stage.arrays is not None:
    replace.remove(stage.arrays)
  replace.clear(stage.directory, locks.NAME, replace.REPLACED)
  files.write_whole(file, json.dumps(plan))


def _is_as_recorded(stage: Stage) -> bool:
  """Whether what the journals say is written is there, to be gone on with.

  It is not if somebody has deleted some of it. What its writer was done with,
  but was killed before it could seal it, is sealed.
  """
  if stage.arrays is not None:
    return stage.arrays.exists()
  if replace.is_published(stage.output):
    return True
  sealed = (stage.directory / replace.COMPLETE).exists()
  finished = replace.is_finished(stage.checkpoint)
  if not finished and (sealed or not replace.is_unfinished(stage.checkpoint)):
    return False
  if not recorded.is_there(stage.checkpoint, journal.read_all(stage.directory)):
    return False
  if finished and not sealed:
    stage.seal_here()
  return True


def _keep_or_remove(stage: Stage) -> None:
  try:
    stage.close()
    if jax.process_index() != 0:
      return
    # Not what another merge has begun, which took this over.
    stage.demand_ours()
    written = len(set().union(*journal.read_all(stage.directory)))
    if not written and not stage.complete:
      stage.remove()
      return
  except (OSError, ValueError) as error:
    logging.warning('%s is left as it is: %s', stage.directory, error)
    return
  logging.warning(
    'The merge stopped after %d boxes. They are kept in %s; the same merge, '
    'started again, does what is missing, and another one into this output '
    'needs resume=False (--noresume).',
    written,
    stage.directory if stage.arrays is None else stage.arrays,
  )


def _remove_empty(directory: epath.Path) -> None:
  if jax.process_index() == 0 and remote.is_local(directory):
    # Another merge into the same output may have begun.
    with contextlib.suppress(OSError):
      os.rmdir(directory)
