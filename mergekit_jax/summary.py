"""What came of an output: its report, made of what the journal holds."""

from __future__ import annotations

import resource
import sys
from typing import Any

from mergekit_jax import doubts
from mergekit_jax import report as reports
from mergekit_jax.checkpoint.stage import Stage
from mergekit_jax.drive import is_random
from mergekit_jax.forecast import unstacked_warnings
from mergekit_jax.job import Job
from mergekit_jax.outputs import Output
from mergekit_jax.rule import needs_of, scope_of


def report(
  job: Job,
  output: Output,
  stage: Stage,
  described: dict[str, Any],
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
    done: units that were not read, since all outputs had them.
    seconds: that the merge took.
    format: of the output, or None for that of the first source.
  """
  records = stage.records()
  planned = {t.path: t for scope in job.plan.scopes for t in scope.tensors}
  sums = reports.add_sums(records)
  tensors = [
    reports.tensor_report(path, planned[path].shape, of_tensor)
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
  warnings = reports.rounding_warnings(tensors, names, stored)
  warnings += reports.unmoved_warnings(tensors, names, job.copied)
  warnings += reports.distance_warnings(tensors, names)
  checksums: dict[str, list[Any]] = {}
  for record in records:
    checksums.setdefault(record['path'], []).extend(record['parts'])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return reports.MergeReport(
    output=str(output.path),
    restore=_restore(job, output, format),
    tensors=tensors,
    copied=list(job.copied),
    ratios=reports.model_ratios(
      {path: planned[path].shape for path in sums}, sums
    ),
    warnings=[
      *(warnings if job.plan.has_base else []),
      *(unstacked_warnings(job.plan) if _sees_layers(job, output) else []),
      *doubts.warnings_of(job),
    ],
    rounds=job.plan.rounds,
    units_done=len(records) - len(stage.done),
    units_resumed=len(stage.done),
    bytes_read=sum(u.source_bytes for u in job.plan.units(done)),
    bytes_written=job.plan.bytes_written // job.plan.merges,
    seconds=seconds,
    peak_memory=peak if sys.platform == 'darwin' else peak * 1024,
    provenance=described,
    checksums=checksums,
  )


def _sees_layers(job: Job, output: Output) -> bool:
  """Whether it matters to a merge which leaves hold several layers."""
  of_tensor = any(
    scope.rounds[output.number]
    for scope in job.plan.scopes
    if scope.rules and scope_of(scope.rules[output.number]) == 'tensor'
  )
  return (
    of_tensor
    or needs_of(output.method) != 'element'
    or is_random(output.method, len(job.experts))
  )


def _restore(job: Job, output: Output, format: str | None) -> str:
  """The call that restores an output, if Orbax can."""
  if (format or job.template.format) != 'orbax':
    return ''
  layout = job.template.layout
  item = output.path / (layout.item if layout else '')
  return f'orbax.checkpoint.StandardCheckpointer().restore({str(item)!r})'
