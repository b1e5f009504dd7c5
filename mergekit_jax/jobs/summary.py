"""What came of an output: its report, made of what the journal holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import math
import resource
import sys
from typing import Any

import jax
import numpy as np

from mergekit_jax import report as reports
from mergekit_jax.checkpoint import companions
from mergekit_jax.checkpoint.stage import Stage
from mergekit_jax.jobs.job import Job
from mergekit_jax.jobs.outputs import Output
from mergekit_jax.report import TensorReport


def report(
  job: Job,
  output: Output,
  stage: Stage,
  *,
  described: dict[str, Any],
  warnings: Sequence[str],
  done: frozenset[int],
  seconds: float,
  format: str | None,
) -> reports.MergeReport:
  """The report of an output whose units are all written.

  Args:
    job: the merge.
    output: which of its outputs.
    stage: that it was made in.
    described: from `provenance.describe`.
    warnings: from `caveats.of_job`.
    done: units that were not read, since all outputs had them.
    seconds: that the merge took.
    format: of the output, or None for that of the first source.
  """
  records = stage.records()
  planned = {t.path: t for scope in job.plan.scopes for t in scope.tensors}
  sums = add_sums(records)
  tensors = [
    tensor_report(path, planned[path].shape, of_tensor)
    for path, of_tensor in sums.items()
  ]
  of_experts = [
    planned[tensor.path].sources[job.plan.has_base :] for tensor in tensors
  ]
  stored = [
    ', '.join(sorted({str(sources[i]) for sources in of_experts}))
    for i in range(len(job.experts))
  ]
  names = [f'{m.name} ({m.checkpoint.path})' for m in job.experts]
  found = []
  if job.plan.has_base:
    found += rounding_warnings(tensors, names, stored)
    found += unmoved_warnings(tensors, names, job.copied)
    found += distance_warnings(tensors, names)
  checksums: dict[str, list[Any]] = {}
  for record in records:
    checksums.setdefault(record['path'], []).extend(record['parts'])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return reports.MergeReport(
    output=str(output.path),
    restore=_restore(job, output, format),
    tensors=tensors,
    copied=list(job.copied),
    ratios=model_ratios({path: planned[path].shape for path in sums}, sums),
    warnings=[*found, *warnings],
    rounds=max(
      (scope.rounds[output.number] for scope in job.plan.scopes if scope.rules),
      default=0,
    ),
    units_done=len(records) - len(stage.done),
    units_resumed=len(stage.done),
    bytes_read=sum(u.source_bytes for u in job.plan.units(done)),
    bytes_written=job.plan.bytes_written // job.plan.merges,
    seconds=seconds,
    peak_memory=peak if sys.platform == 'darwin' else peak * 1024,
    provenance=described,
    checksums=checksums,
    companions=_companions(job, stage, format),
  )


def _restore(job: Job, output: Output, format: str | None) -> str:
  """The call that restores an output, if Orbax can."""
  if (format or job.template.format) != 'orbax':
    return ''
  layout = job.template.layout
  return reports.restore_call(output.path / (layout.item if layout else ''))


def _companions(job: Job, stage: Stage, format: str | None) -> dict[str, str]:
  """The digests of what lies beside the weights of an output."""
  # The others may not see yet what the first process has written.
  if (format or job.template.format) == 'orbax' or jax.process_index() != 0:
    return {}
  return companions.digests(
    stage.output if stage.published else stage.checkpoint
  )


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
  if len(copied) == 1:
    unseen = f' 1 leaf, {copied[0]}, was not compared.'
  elif copied:
    unseen = f' {len(copied)} leaves, such as {copied[0]}, were not compared.'
  return [
    f'{name} is the base in every merged tensor: all its task vectors are 0, '
    'in float32.' + unseen
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
