"""What a merge did: numbers per tensor, cost, provenance."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
import dataclasses
import json
import math
from typing import Any

from etils import epath

from mergekit_jax.checkpoint import files
from mergekit_jax.checkpoint.remote import as_path, real_path

_RESTORE = 'orbax.checkpoint.StandardCheckpointer().restore'


@dataclasses.dataclass(frozen=True)
class TensorReport:
  """What a merge did to one tensor.

  Attributes:
    path: its path in the output.
    shape: its shape.
    base_norm: ‖θ0‖; 0 without a base.
    task_vector_norms: ‖θi − θ0‖ of every expert; ‖θi‖ without a base.
    merge_norm: ‖θ − θ0‖ of the merge; ‖θ‖ without a base.
    rounding: how much of each task vector the rounding of the expert's stored
      dtype could explain: the norm of the expected rounding error / ‖θi − θ0‖.
    ratios: what the method reported: `density` and `sign_conflict`, as
      fractions, one number or one an expert.
  """

  path: str
  shape: tuple[int, ...]
  base_norm: float
  task_vector_norms: list[float]
  merge_norm: float
  rounding: list[float]
  ratios: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """What a streamed merge did.

  Attributes:
    output: where the merged checkpoint lies.
    restore: how Orbax restores it; nothing for other formats.
    tensors: one report a merged tensor.
    copied: paths that were copied from the base.
    ratios: what the method reported, over the whole model: of all entries, or
      of those that count, not a mean of the tensors' ratios.
    warnings: what the user should know.
    rounds: how often the rule asks for totals. Each time every box is read once
      more, but for those that hold all that a total is about.
    units_done: boxes that this run merged or copied.
    units_resumed: boxes that an earlier, unfinished run had merged or copied.
    bytes_read: bytes that this run took from the sources.
    bytes_written: bytes of the output's arrays.
    seconds: wall time.
    peak_memory: the most memory that this process ever held, in bytes.
    provenance: method, hyperparameters, sources with fingerprints, seed,
      versions.
    checksums: the parts of every leaf as they were written: origin, shape and
      CRC-32 of each.
    companions: the SHA-256 of every file beside the weights of a safetensors
      output, by name; of several processes the first alone has them.
  """

  output: str
  restore: str
  tensors: list[TensorReport] = dataclasses.field(repr=False)
  copied: list[str]
  ratios: dict[str, float]
  warnings: list[str]
  rounds: int
  units_done: int
  units_resumed: int
  bytes_read: int
  bytes_written: int
  seconds: float
  peak_memory: int
  provenance: dict[str, Any] = dataclasses.field(repr=False)
  checksums: dict[str, list[Any]] = dataclasses.field(repr=False)
  companions: dict[str, str] = dataclasses.field(repr=False)

  def save(self, path: epath.Path) -> None:
    """Writes the report as JSON; what is not finite becomes null."""
    data = _finite(dataclasses.asdict(self))
    text = json.dumps(data, indent=1, allow_nan=False) + '\n'
    files.write_whole(path, text)

  def table(self) -> str:
    """A summary for people."""
    lines = [
      f'{len(self.tensors)} tensors merged, {len(self.copied)} copied, '
      f'{self.units_done} boxes'
      + (f' and {self.units_resumed} resumed' if self.units_resumed else ''),
      f'read {readable(self.bytes_read)}, '
      f'wrote {readable(self.bytes_written)} in {self.seconds:.1f} s; '
      f'peak memory {readable(self.peak_memory)}',
    ]
    for name, value in self.overall().items():
      lines.append(f'{name}: {value}')
    if self.restore:
      lines.append(f'restore: {self.restore}')
    return '\n'.join([*lines, *_warned(self.warnings, 'the report')])

  @property
  def task_vector_norms(self) -> list[float]:
    """‖θi − θ0‖ of every expert over the whole model; ‖θi‖ without a base."""
    norms = zip(*(t.task_vector_norms for t in self.tensors), strict=True)
    return [math.hypot(*of_expert) for of_expert in norms]

  @property
  def merge_norm(self) -> float:
    """‖θ − θ0‖ of the merge over the whole model; ‖θ‖ without a base."""
    return math.hypot(*(t.merge_norm for t in self.tensors))

  def overall(self) -> dict[str, str]:
    """Norms and ratios over the whole model, as text."""
    if not self.tensors:
      return {}
    norms = ' '.join(f'{norm:.4g}' for norm in self.task_vector_norms)
    has_base = 'base' in self.provenance['sources']
    what = 'task vectors' if has_base else 'experts'
    return {
      f'norms of the {what}': norms,
      'norm of the merged task vector' if has_base else 'norm of the merge': (
        f'{self.merge_norm:.4g}'
      ),
      **{
        name.replace('_', ' '): f'{ratio:.4f}'
        for name, ratio in self.ratios.items()
      },
    }


def comparison(reports: Mapping[str, MergeReport]) -> str:
  """A summary of merges that were made from one read, a line each, for people.

  What is the same for all of them is said once, and how to restore the first.
  """
  of_all = [*reports.values()]
  rows = {name: report.overall() for name, report in reports.items()}
  columns = dict.fromkeys(column for row in rows.values() for column in row)
  column_of = lambda name: [row.get(name, '') for row in rows.values()]
  shared = [name for name in columns if len({*column_of(name)}) == 1]
  apart = {name: column_of(name) for name in columns if name not in shared}
  table = [
    [title, *cells] for title, cells in {'merge': [*rows], **apart}.items()
  ]
  widths = [max(map(len, column)) for column in table]
  warnings = dict.fromkeys(w for report in of_all for w in report.warnings)
  resumed = max(report.units_resumed for report in of_all)
  return '\n'.join(
    [
      f'{len(of_all)} merges of {len(of_all[0].tensors)} tensors, '
      f'{len(of_all[0].copied)} copied'
      + (f', resumed boxes: {resumed}' if resumed else ''),
      f'read {readable(max(report.bytes_read for report in of_all))}, '
      f'wrote {readable(sum(report.bytes_written for report in of_all))} in '
      f'{max(report.seconds for report in of_all):.1f} s; peak memory '
      f'{readable(max(report.peak_memory for report in of_all))}',
      *(f'{name}: {column_of(name)[0]}' for name in shared),
      *(
        '  '.join(map(str.ljust, line, widths)).rstrip()
        for line in zip(*table, strict=True)
      ),
      *(
        f'restore {name}: {report.restore}'
        for name, report in [*reports.items()][:1]
        if report.restore
      ),
      *_warned(warnings, 'the reports'),
    ]
  )


def _warned(warnings: Collection[str], where: str) -> list[str]:
  """Says that there were warnings, which are logged as they come up."""
  if not warnings:
    return []
  number = f'{len(warnings)} warning{"s" if len(warnings) > 1 else ""}'
  return [f'{number}: in the log, and in {where}']


def report_path(output: epath.PathLike) -> epath.Path:
  """Where the report of a merge lies: beside its output, links followed."""
  output = real_path(as_path(output))
  return output.parent / f'{output.name}.report.json'


def restore_call(item: epath.Path) -> str:
  """The call with which Orbax restores an item."""
  return f'{_RESTORE}({str(item)!r})'


def written_item(report: Mapping[str, Any]) -> str:
  """Where in an output its item was written; nothing if it is all of it.

  Args:
    report: as JSON has it.

  Raises:
    ValueError, LookupError, TypeError, SyntaxError: it is no report, or is
      damaged.
  """
  if not report['restore']:
    return ''
  place = ast.literal_eval(report['restore'].removeprefix(_RESTORE))
  inside = as_path(place).relative_to(as_path(report['output']))
  return '/'.join(inside.parts)


def is_report(path: epath.Path) -> bool:
  """Whether a file is the report of a merge."""
  try:
    return 'provenance' in json.loads(path.read_text())
  except (OSError, ValueError, TypeError):
    return False


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def readable(count: float) -> str:
  """A number of bytes, for people."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:.1f} {unit}' if unit != 'B' else f'{count:.0f} B'
    count /= 1024
  return f'{count:.1f} TiB'
