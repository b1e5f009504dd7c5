"""The outputs of a merge: one, or several that share every read."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import dataclasses
import itertools
import os
from typing import Any

from etils import epath

from mergekit_jax import checks
from mergekit_jax.checkpoint import (
  Checkpoint,
  FORMATS,
  orbax_layout,
  orbax_write,
)
from mergekit_jax.checkpoint.remote import (
  as_path,
  demand_possible_output,
  is_local,
  real_path,
)
from mergekit_jax.checkpoint.replace import (
  beside,
  check_destination,
  is_beside,
  KINDS,
  what_else,
)
from mergekit_jax.jobs.job import Job
from mergekit_jax.report import is_report, report_path


@dataclasses.dataclass(frozen=True)
class Output:
  """One merge and where it goes.

  Attributes:
    number: its place among the merges that are made together.
    name: what the caller calls it; empty if it is the only one.
    method: the rule.
    path: directory of the new checkpoint.
    seed: seed of its random numbers.
  """

  number: int
  name: Any
  method: Any
  path: epath.Path
  seed: int

  def demand_possible(
    self, job: Job, options: Mapping[str, Any], overwrite: bool, resume: bool
  ) -> None:
    """Refuses what cannot be written, before anything is.

    Args:
      job: the merge.
      options: of the format, by name; what is None was not given.
      overwrite: whether an output that exists may be replaced.
      resume: whether it may be there already from a merge that was killed as it
        put several in their places.

    Raises:
      ValueError: if an option belongs to another format, the format cannot hold
        the tree or be written to the path, the output and a source lie in each
        other, a source lies where the merge clears up, the output lies in a
        file or in another checkpoint, or it would be taken for a step of
        others, for unfinished or for what another merge has left.
      FileExistsError: if the output exists, or anything but a report where its
        report is to lie.
    """
    format = options['format'] or job.template.format
    checks.one_of('format', format, FORMATS)
    demand_possible_output(self.path, format)
    for name, value in options.items():
      other = 'safetensors' if name == 'shard_size' else 'orbax'
      if name != 'format' and value is not None and format != other:
        raise ValueError(
          f'{name}={value!r} was given, which is an option of {other}, but the '
          f'output is {format}. Leave it out, or give format={other!r}.'
        )
    if format == 'orbax':
      orbax_write.demand_possible_path(self.path)
      orbax_write.demand_storable(job.output_specs())
    for source in job.models:
      self._demand_kept(source.name, source.checkpoint)
    if is_beside(self.path):
      raise ValueError(
        f'output={self.path} would be taken for what another merge keeps beside'
        ' its output, and be removed. Give a path in which nothing ends in '
        '.mergekit-tmp or .mergekit-old.'
      )
    for parent in self.path.parents if is_local(self.path) else ():
      if os.path.exists(parent) and not os.path.isdir(parent):
        raise ValueError(
          f'output={self.path} lies in {parent}, which is a file. Give a path '
          'in a directory.'
        )
    if around := _checkpoint_around(self.path):
      raise ValueError(
        f'output={self.path} lies in {around}, which is a checkpoint. It '
        'would not be replaced any more with something else in it: give a '
        'directory outside of it.'
      )
    if orbax_layout.would_be_step(self.path):
      parent = self.path.parent
      raise ValueError(
        f'output={self.path} would be taken for a step of the checkpoints in '
        f'{parent}, and has no such layout: the output keeps the step of the '
        'base inside. Give a directory of its own, such as '
        f'{parent.parent / f"{parent.name}-merged"}.'
      )
    if orbax_layout.is_unfinished(self.path):
      raise ValueError(
        f'output={self.path} would be taken for a save that Orbax has not '
        'finished, and not be read. Give it another name.'
      )
    check_destination(self.path, overwrite, resume)
    report = report_path(self.path)
    # Also with overwrite, which is about the output.
    if report.exists() and not is_report(report):
      raise FileExistsError(
        f'{report} exists and is not the report of a merge. Move it away, or '
        'give another output.'
      )

  def _demand_kept(self, name: str, source: Checkpoint) -> None:
    """Refuses a source that would be written to or removed."""
    if _lies_at(self.path, source):
      raise ValueError(
        f'output={self.path} and {name} ({source.path}) lie in each other. '
        'Give an output outside of all sources; sources are never written to.'
      )
    for kind in KINDS:
      place = beside(self.path, kind)
      if _lies_at(place, source):
        raise ValueError(
          f'{name} ({source.path}) lies in {place}, which a merge into '
          f'{self.path} removes before it reads anything. Move the source '
          'elsewhere first: give it another name.'
        )


def outputs_of(method: Any, output: Any, seed: Any) -> list[Output]:
  """The outputs that the arguments of `merge_checkpoints` name.

  Args:
    method: a rule or {name: rule}.
    output: a path or {name: path}.
    seed: a whole number or {name: number}.

  Returns:
    The outputs, in the order of `output`.

  Raises:
    ValueError: if the dictionaries have other names, two paths are one, or a
      path or a seed is none.
  """
  given = {'method': method, 'output': output, 'seed': seed}
  named = {k: v for k, v in given.items() if isinstance(v, Mapping)}
  if not named:
    return [_output(0, '', method, output, seed)]
  if 'output' not in named or not output:
    raise ValueError(
      f'{" and ".join(named)} names several merges, but output={output!r}. '
      'Give a dictionary of the same names, with a path for each.'
    )
  for argument, value in named.items():
    if value.keys() != output.keys():
      raise ValueError(
        f'{argument} names {", ".join(map(str, value))} and output names '
        f'{", ".join(map(str, output))}; give both the same names.'
      )
  of = lambda argument, name: (
    named[argument][name] if argument in named else given[argument]
  )
  outputs = [
    _output(number, name, of('method', name), path, of('seed', name))
    for number, (name, path) in enumerate(output.items())
  ]
  for one, other in itertools.combinations(outputs, 2):
    if _overlap(one.path, other.path):
      raise ValueError(
        f'The outputs {one.name} and {other.name} lie in each other: '
        f'{one.path} and {other.path}. Give each a directory of its own.'
      )
  return outputs


def _output(
  number: int, name: Any, method: Any, path: Any, seed: Any
) -> Output:
  """An output whose path is what the file system makes of it.

  A link is followed, so that what it leads to is written or replaced, and the
  link stays; the report lies beside what is written.
  """
  if not isinstance(path, (str, os.PathLike)):
    argument = 'output' if name == '' else f'output[{name!r}]'
    raise ValueError(
      f'{argument} is a {type(path).__name__}; give the path of a new '
      'checkpoint.'
    )
  real = real_path(as_path(path))
  return Output(number, name, method, real, checks.seed('seed', seed))


def _checkpoint_around(path: epath.Path) -> epath.Path | None:
  """The checkpoint in which an output would lie, if there is one.

  Steps of a CheckpointManager and safetensors files may have other things
  beside them, except in the output of a merge.
  """
  # Of an object store, where each look takes a while, the nearest alone.
  for parent in path.parents if is_local(path) else [path.parent]:
    with contextlib.suppress(PermissionError):  # of what is not the user's
      if orbax_layout.is_part(parent) or (
        is_report(report_path(parent)) and not what_else(parent)
      ):
        return parent
  return None


def _lies_at(place: epath.Path, source: Checkpoint) -> bool:
  """Whether a source lies in a place or around it."""
  # Its files may be links into it.
  return _overlap(place, source.path) or any(
    real_path(place) in (directory, *directory.parents)
    for directory in source.directories
  )


def _overlap(one: epath.Path, other: epath.Path) -> bool:
  """Whether two paths are one, or one lies in the other."""
  one, other = real_path(one), real_path(other)
  return one == other or one in other.parents or other in one.parents
