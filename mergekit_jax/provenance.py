"""What is known of an output: how it was made, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import importlib.metadata
import resource
from typing import Any

import jax

from mergekit_jax import report as reports
from mergekit_jax.checkpoint.stage import Stage
from mergekit_jax.job import Job
from mergekit_jax.outputs import Output
from mergekit_jax.version import __version__


def describe(
  job: Job, output: Output, overrides: Mapping[str, Any] | None
) -> dict[str, Any]:
  """What an output was made of and how, as JSON can hold it."""
  packages = ('jax', 'orbax-checkpoint', 'tensorstore')
  return {
    'method': repr(output.method),
    'overrides': {key: repr(rule) for key, rule in (overrides or {}).items()},
    'seed': output.seed,
    'sources': {
      model.name: {
        'path': str(model.checkpoint.path),
        'fingerprint': model.checkpoint.fingerprint(),
      }
      for model in job.models
    },
    'mesh': dict(job.plan.mesh.shape),
    'versions': {
      'mergekit_jax': __version__,
      **{name: importlib.metadata.version(name) for name in packages},
    },
  }


def of_bits(
  job: Job, options: Mapping[str, Any], described: Mapping[str, Any]
) -> dict[str, Any]:
  """What decides the bits of an output: a resume must agree with it.

  Args:
    job: the merge.
    options: of the output's format.
    described: from `describe`. Each source is named apart, so that one that
      has changed is.
  """
  boxes = [
    [tensor.path, str(tensor.dtype), box.origin, box.shape, str(box.spec)]
    for scope in job.plan.scopes
    for tensor in scope.tensors
    for box in tensor.boxes
  ]
  named = dict(described)
  sources = named.pop('sources')
  return {
    **named,
    **{f'source {name}': source for name, source in sources.items()},
    'units': hashlib.blake2b(repr(boxes).encode(), digest_size=16).hexdigest(),
    'memory_budget': job.plan.memory_budget,
    'processes': jax.process_count(),
    'layout': str(job.template.layout),
    **options,
    'format': options['format'] or job.template.format,
  }


def report(
  job: Job,
  output: Output,
  stage: Stage,
  described: dict[str, Any],
  seconds: float,
) -> reports.MergeReport:
  """The report of an output whose units are all written."""
  records = stage.records()
  planned = {t.path: t for scope in job.plan.scopes for t in scope.tensors}
  tensors = [
    reports.tensor_report(path, planned[path].shape, sums)
    for path, sums in reports.add_sums(records).items()
  ]
  experts = job.models[job.has_base :]
  stored = [
    ', '.join(
      sorted({str(planned[t.path].sources[job.has_base + i]) for t in tensors})
    )
    for i in range(len(experts))
  ]
  names = [f'{m.name} ({m.checkpoint.path})' for m in experts]
  warnings = reports.rounding_warnings(tensors, names, stored)
  checksums: dict[str, list[Any]] = {}
  for record in records:
    checksums.setdefault(record['path'], []).extend(record['parts'])
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return reports.MergeReport(
    output=str(output.path),
    tensors=tensors,
    copied=list(job.copied),
    warnings=[
      *(warnings if job.has_base else []),
      *reports.left_out_warnings(job.left_out),
    ],
    rounds=job.plan.rounds,
    units_done=len(records) - len(stage.done),
    units_resumed=len(stage.done),
    bytes_read=job.plan.bytes_read,
    bytes_written=job.plan.bytes_written // job.plan.merges,
    seconds=seconds,
    peak_memory=kilobytes * 1024,
    provenance=described,
    checksums=checksums,
  )
