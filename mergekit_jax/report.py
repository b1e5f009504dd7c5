"""What a merge did: numbers per tensor, cost, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

from etils import epath
import jax
import numpy as np

from mergekit_jax.checkpoint import files
from mergekit_jax.checkpoint.remote import as_path, real_path


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
    rounds: full reads before the last one.
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

  def save(self, path: epath.Path) -> None:
    """Writes the report as JSON; what is not finite becomes null."""
    data = _finite(dataclasses.asdict(self))
    text = json.dumps(data, indent=1, allow_nan=False) + '\n'
    files.write_whole(path, text)

  def table(self) -> str:
    """A summary for people."""
    lines = [
      f'{len(self.tensors)} tensors merged, {len(self.copied)} copied, '
      f'{self.units_done} units'
      + (f' and {self.units_resumed} resumed' if self.units_resumed else ''),
      f'read {readable(self.bytes_read)}, '
      f'wrote {readable(self.bytes_written)} in {self.seconds:.1f} s; '
      f'peak memory {readable(self.peak_memory)}',
    ]
    for name, value in self.overall().items():
      lines.append(f'{name}: {value}')
    if self.restore:
      lines.append(f'restore: {self.restore}')
    return '\n'.join([*lines, *(f'warning: {w}' for w in self.warnings)])

  def overall(self) -> dict[str, str]:
    """Norms and ratios over the whole model, as text."""
    if not self.tensors:
      return {}
    squares = np.square([t.task_vector_norms for t in self.tensors])
    merged = math.hypot(*(t.merge_norm for t in self.tensors))
    norms = ' '.join(f'{norm:.4g}' for norm in np.sqrt(squares.sum(axis=0)))
    has_base = 'base' in self.provenance['sources']
    what = 'task vectors' if has_base else 'experts'
    return {
      f'norms of the {what}': norms,
      'norm of the merged task vector' if has_base else 'norm of the merge': (
        f'{merged:.4g}'
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
      + (f', {resumed} units resumed' if resumed else ''),
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
      *(f'warning: {warning}' for warning in warnings),
    ]
  )


def report_path(output: epath.PathLike) -> epath.Path:
  """Where the report of a merge lies: beside its output, links followed."""
  output = real_path(as_path(output))
  return output.parent / f'{output.name}.report.json'


def is_report(path: epath.Path) -> bool:
  """Whether a file is the report of a merge."""
  try:
    return 'provenance' in json.loads(path.read_text())
  except (OSError, ValueError, TypeError):
    return False


def add_sums(
  records: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Adds up what `stream.run` recorded of the units of each merged tensor."""
  sums: dict[str, Any] = {}
  for record in records:
    if 'sums' in record:
      path, new = record['path'], jax.tree.map(np.asarray, record['sums'])
      old = sums.get(path)
      sums[path] = new if old is None else jax.tree.map(np.add, old, new)
  return sums


def tensor_report(
  path: str, shape: tuple[int, ...], sums: Mapping[str, Any]
) -> TensorReport:
  """Turns sums into norms and ratios."""
  squares = np.atleast_1d(np.asarray(sums['experts']))
  rounding = np.atleast_1d(np.asarray(sums['rounding']))
  with np.errstate(all='ignore'):
    explained = np.where(squares > 0, np.sqrt(rounding / squares), 0.0)
  ratio_of = lambda counts: _ratio(*_parts(counts, math.prod(shape)))
  return TensorReport(
    path,
    shape,
    float(np.sqrt(sums['base'])),
    np.sqrt(squares).tolist(),
    float(np.sqrt(sums['merged'])),
    explained.tolist(),
    jax.tree.map(ratio_of, sums['flags'], is_leaf=_has_whole),
  )


def model_ratios(
  shapes: Mapping[str, tuple[int, ...]], sums: Mapping[str, Any]
) -> dict[str, float]:
  """What was reported of the tensors that report it, as one ratio a name.

  Args:
    shapes: of the merged tensors.
    sums: from `add_sums`, of the same tensors.
  """
  totals: dict[str, np.ndarray] = {}
  for path, shape in shapes.items():
    for name, counts in sums[path]['flags'].items():
      total = totals.setdefault(name, np.zeros(2))
      for each in jax.tree.leaves(counts, is_leaf=_has_whole):
        total += _parts(each, math.prod(shape))
  return {name: _ratio(*total) for name, total in totals.items()}


def _has_whole(counts: Any) -> bool:
  """Whether counts say themselves of how many entries they are."""
  return isinstance(counts, dict) and counts.keys() == {'part', 'whole'}


def _parts(counts: Any, size: int) -> tuple[float, float]:
  """How many entries were counted, and of how many; of all by default."""
  if _has_whole(counts):
    return float(counts['part']), float(counts['whole'])
  return float(counts), float(size)


def _ratio(part: float, whole: float) -> float:
  return float(part / whole) if whole else 0.0


def unmoved_warnings(
  tensors: list[TensorReport], names: list[str], copied: Sequence[str]
) -> list[str]:
  """Warns of experts that are the base.

  Args:
    tensors: the reports.
    names: what to call the experts.
    copied: the leaves that are copied from the base, whatever experts have.
  """
  unseen = ''
  if copied:
    unseen = f' {len(copied)} leaves, such as {copied[0]}, were not compared.'
  return [
    f'{name} is the base in every merged tensor: all its task vectors are 0.'
    + unseen
    for i, name in enumerate(names)
    if tensors and not any(t.task_vector_norms[i] for t in tensors)
  ]


def distance_warnings(
  tensors: list[TensorReport], names: list[str]
) -> list[str]:
  """Warns of experts that are as far from the base as another model may be.

  Args:
    tensors: the reports.
    names: what to call the experts.
  """
  base = math.hypot(*(t.base_norm for t in tensors))
  warnings = []
  for i, name in enumerate(names):
    distance = math.hypot(*(t.task_vector_norms[i] for t in tensors))
    if distance > base:
      warnings.append(
        f'{name}: its task vector is longer than the base, {distance:.4g} and '
        f'{base:.4g}. It may not have been fine-tuned from this base.'
      )
  return warnings


def rounding_warnings(
  tensors: list[TensorReport], names: list[str], dtypes: list[str]
) -> list[str]:
  """Warns of experts that were stored too coarsely for their task vector.

  Args:
    tensors: the reports.
    names: what to call the experts.
    dtypes: the dtypes in which they are stored.

  Returns:
    A sentence for every expert that has a tensor of which rounding could
    explain more than half.
  """
  warnings = []
  for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True)):
    worst = [t for t in tensors if t.rounding[i] > 0.5]
    if worst:
      example = max(worst, key=lambda t: t.rounding[i])
      warnings.append(
        f'{name}: in {len(worst)} of {len(tensors)} tensors the rounding of '
        f'{dtype} could explain more than half of the task vector (most in '
        f'{example.path}: {example.rounding[i]:.0%}). Save experts of short '
        'fine-tunes in float32.'
      )
  return warnings


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
