"""The merge of checkpoints: validate → plan → stream → commit → report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import hashlib
import importlib.metadata
import os
import resource
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from mergekit_jax import checks, reading, stream, tree
from mergekit_jax import report as reports
from mergekit_jax.checkpoint import FORMATS, write_checkpoint
from mergekit_jax.checkpoint.remote import demand_local_output, is_local
from mergekit_jax.checkpoint.stage import staged
from mergekit_jax.job import Job, make_job
from mergekit_jax.kernels.random import key_for
from mergekit_jax.progress import progress
from mergekit_jax.version import __version__


def merge_checkpoints(
  method: Any,
  *,
  experts: Sequence[epath.PathLike],
  base: epath.PathLike | None = None,
  output: epath.PathLike,
  mesh: Mesh | None = None,
  seed: int = 0,
  memory_budget: int | str = '4GiB',
  format: str | None = None,
  shard_size: int | str | None = None,
  stacked_axes: Mapping[str, int | tuple[int, ...]] | None = None,
  overrides: Mapping[str, Any] | None = None,
  dtype: Any = None,
  partition_rules: Mapping[str, PartitionSpec] | None = None,
  allow_nonfinite: bool = False,
  resume: bool = True,
  overwrite: bool = False,
) -> reports.MergeReport:
  """Merges checkpoints by streaming; no host ever holds a whole model.

  The output holds the base's tree from its parameter root down, at the same
  path and in the same layout: floating-point leaves merged, others copied. It
  appears at `output` only when it is complete; a report lies beside it, as
  `<output>.report.json`.

  Args:
    method: a merge rule, such as `mergekit_jax.ties(density=0.2)`.
    experts: the experts' checkpoints: Orbax or safetensors.
    base: the checkpoint of the model they were fine-tuned from.
    output: directory of the new checkpoint.
    mesh: the devices to merge on; None takes all, on one axis.
    seed: seed of the methods that draw random numbers: the same masks as
      `merge(..., key=jax.random.key(seed))`.
    memory_budget: host memory that the merge may take, as bytes or as text such
      as '512MiB', without what imports and runtime take.
    format: 'orbax' or 'safetensors'; None keeps the base's. Tensors are called
      by their paths in both, so a merge can convert.
    shard_size: most bytes of tensors in a safetensors file, or text such as
      '5GB'; None keeps the base's shards.
    stacked_axes: {regex of a path: axis or axes} of leaves that hold several
      layers. Checkpoints whose metadata says `scan_layers` are recognised.
    overrides: {regex of a path: 'base' or a rule}, the first match wins.
    dtype: dtype of the merged leaves; None keeps the base's.
    partition_rules: {regex of a path: PartitionSpec}; other leaves are sharded
      by their largest dimensions.
    allow_nonfinite: let NaN and Inf in the sources through.
    resume: go on with what a killed merge into this output left behind, if it
      was the same merge; else throw it away.
    overwrite: replace an output that exists, once the new one is complete.

  Returns:
    What was done.

  Raises:
    FileNotFoundError: if a source does not exist.
    FileExistsError: if the output exists.
    ValueError: if an argument or a source does not fit; nothing was read.
    FloatingPointError: if a source holds NaN or Inf.
    OSError: if a source cannot be read or the output not written.
  """
  start = time.perf_counter()
  demand_local_output(output)
  output = epath.Path(output)
  if format is not None:
    checks.one_of('format', format, FORMATS)
  job = make_job(
    method,
    experts,
    base,
    mesh=mesh,
    memory_budget=memory_budget,
    stacked_axes=stacked_axes,
    overrides=overrides,
    dtype=dtype,
    partition_rules=partition_rules,
  )
  _demand_free(output, job.models, overwrite)
  format = format or job.template.format
  if shard_size is not None and format != 'safetensors':
    raise ValueError(
      f'shard_size={shard_size!r} was given, but the output is {format}, which '
      "has no shards. Leave it out, or give format='safetensors'."
    )
  provenance = _provenance(job, overrides, seed)
  begun_with = {
    **provenance,
    **_described_output(job),
    'format': format,
    'shard_size': shard_size,
  }
  with staged(output, begun_with, overwrite=overwrite, resume=resume) as stage:

    def produce(write: Any) -> None:
      with progress(job.plan, stage.done) as advanced:
        stream.run(
          job.plan,
          job.models,
          has_base=job.has_base,
          keys=_keys(job, seed),
          done=stage.done.keys(),
          write=write,
          record=stage.record,
          allow_nonfinite=allow_nonfinite,
          advanced=advanced,
        )

    if not stage.checkpoint.exists():
      write_checkpoint(
        stage.checkpoint,
        _output_specs(job),
        job.template,
        produce,
        format=format,
        shard_size=shard_size,
        chunks={
          tensor.path: reading.part_shape(tensor.boxes[0], job.plan.mesh)
          for scope in job.plan.scopes
          for tensor in scope.tensors
        },
        metadata={'mergekit_jax': provenance},
      )
    report = _report(
      job,
      output,
      stage.records(),
      len(stage.done),
      provenance,
      time.perf_counter() - start,
    )
    # Before the output appears, so that no output is ever without a report.
    if jax.process_index() == 0:
      report.save(reports.report_path(output))
  if jax.process_index() == 0:
    for warning in report.warnings:
      logging.warning('%s', warning)
  return report


def _demand_free(
  output: epath.Path, sources: Sequence[reading.Model], overwrite: bool
) -> None:
  """Refuses an output that exists, or that a source lies in or around."""
  here = _real(output)
  for source in sources:
    there = _real(source.checkpoint.path)
    if here == there or there in here.parents or here in there.parents:
      raise ValueError(
        f'output={output} and {source.name} ({source.checkpoint.path}) lie in '
        'each other. Give an output outside of all sources; sources are never '
        'written to.'
      )
  if output.exists() and not overwrite:
    raise FileExistsError(
      f'{output} exists. Give another output, or pass overwrite=True '
      '(--overwrite): it is then replaced once the merge is complete.'
    )


def _real(path: epath.Path) -> epath.Path:
  """The path without symbolic links, where there can be any."""
  return epath.Path(os.path.realpath(path)) if is_local(path) else path


def _keys(job: Job, seed: int) -> dict[str, np.ndarray]:
  """The random key of every merged leaf."""
  key = jax.random.key(seed, impl='threefry2x32')
  return {
    tensor.path: np.asarray(key_for(key, tree.mask_name(tensor.path, job.root)))
    for scope in job.plan.scopes
    if scope.rule is not None
    for tensor in scope.tensors
  }


def _output_specs(job: Job) -> Any:
  """The tree to write: the base's, from its root down, with nnx_aux beside."""
  specs = {
    tensor.path: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
    for scope in job.plan.scopes
    for tensor in scope.tensors
  }

  above = {
    '/'.join(keys[:depth])
    for keys in (path.split('/') for path in specs)
    for depth in range(1, len(keys) + 1)
  }

  def prune(node: Any, path: str) -> Any:
    if not isinstance(node, Mapping) or tree.below(job.root, path):
      return node
    children = {key: f'{path}/{key}' if path else str(key) for key in node}
    return {
      key: prune(node[key], child)
      for key, child in children.items()
      if child in above
    }

  pruned = prune(job.template.tree, '')
  return jax.tree.map_with_path(
    lambda keys, leaf: specs.get(
      jax.tree_util.keystr(keys, simple=True, separator='/'), leaf
    ),
    pruned,
  )


def _provenance(
  job: Job, overrides: Mapping[str, Any] | None, seed: int
) -> dict[str, Any]:
  packages = ('jax', 'orbax-checkpoint', 'tensorstore')
  return {
    'method': repr(job.method),
    'overrides': {key: repr(rule) for key, rule in (overrides or {}).items()},
    'seed': seed,
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


def _described_output(job: Job) -> dict[str, Any]:
  """What else than the provenance decides the bits of the output."""
  boxes = [
    [tensor.path, str(tensor.dtype), box.origin, box.shape, str(box.spec)]
    for scope in job.plan.scopes
    for tensor in scope.tensors
    for box in tensor.boxes
  ]
  return {
    'units': hashlib.blake2b(repr(boxes).encode(), digest_size=16).hexdigest(),
    'memory_budget': job.plan.memory_budget,
    'processes': jax.process_count(),
    'layout': str(job.template.layout),
  }


def _report(
  job: Job,
  output: epath.Path,
  records: Sequence[Mapping[str, Any]],
  resumed: int,
  provenance: dict[str, Any],
  seconds: float,
) -> reports.MergeReport:
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
    output=str(output),
    tensors=tensors,
    copied=list(job.copied),
    warnings=[
      *(warnings if job.has_base else []),
      *reports.left_out_warnings(job.left_out),
    ],
    rounds=job.plan.rounds,
    units_done=len(records) - resumed,
    units_resumed=resumed,
    bytes_read=job.plan.bytes_read,
    bytes_written=job.plan.bytes_written,
    seconds=seconds,
    peak_memory=kilobytes * 1024,
    provenance=provenance,
    checksums=checksums,
  )
