"""The merge of checkpoints: validate → plan → stream → commit → report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import functools
import itertools
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh, PartitionSpec

from mergekit_jax import checks
from mergekit_jax import report as reports
from mergekit_jax.checkpoint import companions, write_checkpoint
from mergekit_jax.checkpoint.stage import Stage, staged
from mergekit_jax.checkpoint.writer import handed_over, Write
from mergekit_jax.jobs import caveats, provenance, summary
from mergekit_jax.jobs.job import Job, make_job, SourceChangedError
from mergekit_jax.jobs.outputs import Output, outputs_of
from mergekit_jax.planning import plan as plans
from mergekit_jax.streaming import reading, stream
from mergekit_jax.streaming.progress import progress
from mergekit_jax.streaming.sink import CheckpointSink


def merge_checkpoints(
  method: Any,
  *,
  experts: Sequence[epath.PathLike],
  base: epath.PathLike | None = None,
  output: epath.PathLike | Mapping[str, epath.PathLike],
  mesh: Mesh | None = None,
  seed: int | Mapping[str, int] = 0,
  memory_budget: int | str = '4GiB',
  format: str | None = None,
  shard_size: int | str | None = None,
  zarr3: bool | None = None,
  compression: str | None = None,
  stacked_axes: Mapping[str, int | tuple[int, ...]] | None = None,
  overrides: Mapping[str, Any] | None = None,
  dtype: Any = None,
  partition_rules: Mapping[str, PartitionSpec] | None = None,
  allow_nonfinite: bool = False,
  resume: bool = True,
  overwrite: bool = False,
) -> Any:
  """Merges checkpoints by streaming; no host ever holds a whole model.

  The output holds the base's tree from its parameter root down, at the same
  path and in the same layout: floating-point leaves merged, others copied. It
  appears at `output` only when it is complete; a report lies beside it, as
  `<output>.report.json`.

  Many merges from one read: give `output` as {name: path}, and `method` or
  `seed` or both as dictionaries of the same names. Every source is then read
  as often as the method with the most rounds asks for, not once a merge.

  Args:
    method: a merge rule, such as `mergekit_jax.ties(density=0.2)`, or
      {name: rule}.
    experts: the experts' checkpoints: Orbax or safetensors.
    base: the checkpoint of the model they were fine-tuned from. None for
      methods without task vectors, such as `average`: the output is then like
      the first expert.
    output: directory of the new checkpoint, or {name: directory}.
    mesh: the devices to merge on; None takes all, on one axis.
    seed: seed of the methods that draw random numbers, or {name: seed}: the
      same masks as `merge(..., key=seed)`.
    memory_budget: host memory that the merge may take, as bytes or as text such
      as '512MiB', without what imports and runtime take.
    format: 'orbax' or 'safetensors'; None keeps the base's. Tensors are called
      by their paths in both, so a merge can convert.
    shard_size: most bytes of tensors in a safetensors file, or text such as
      '5GB'; None keeps the base's shards.
    zarr3: whether an Orbax output stores its arrays as zarr3, else as zarr2;
      None does as the base.
    compression: 'zstd' compresses an Orbax output as Orbax would; None, which
      writes and reads much faster, does not, even where the base is compressed.
    stacked_axes: {regex of a path: axis or axes} of leaves that hold several
      layers. Where metadata says `scan_layers`, axis 1 is assumed for leaves
      that agree along it. The stacks of Gemma's library are known.
    overrides: {regex of a path: 'base' or a rule}, the first match wins. Each
      rule is a scope of its own: totals are over its leaves alone. As the
      'base' has it, or the first expert where there is no base, a leaf may
      differ in the experts; one that only experts have is then left out.
    dtype: of the merged leaves, a dtype or its name; None keeps the base's.
    partition_rules: {regex of a path: PartitionSpec}; other leaves are sharded
      by the first dimensions that the mesh divides.
    allow_nonfinite: let NaN and Inf in the sources through.
    resume: go on with what a killed merge into this output left behind. If that
      was another merge this one is refused; False throws it away.
    overwrite: replace an output that exists, once the new one is complete.

  Returns:
    What was done, a `MergeReport`; of several merges {name: report}.

  Raises:
    FileNotFoundError: if a source does not exist.
    FileExistsError: if the output exists, unless `overwrite` is given and
      nothing else than a checkpoint is there; or something that is no report
      where the report is to lie.
    ValueError: if an argument or a source does not fit, and nothing was read;
      or, afterwards, if a source has changed or another merge has taken over
      the output.
    TypeError: if the rule returns no floating-point array, or a `then` uses
      what it must not.
    FloatingPointError: if a source holds NaN or Inf, or the merge overflows.
    OSError: if a source cannot be read or the output not written.
  """
  start = time.perf_counter()
  checks.some_rules('method', method)
  outputs = outputs_of(method, output, seed)
  job = make_job(
    [output.method for output in outputs],
    experts,
    base,
    mesh=mesh,
    memory_budget=memory_budget,
    stacked_axes=stacked_axes,
    overrides=overrides,
    dtype=dtype,
    partition_rules=partition_rules,
  )
  options = {
    'format': format,
    'shard_size': shard_size,
    'zarr3': zarr3,
    'compression': compression,
  }
  provenance.demand_agreement(
    job,
    {each.name: each.method for each in outputs},
    {each.name: each.seed for each in outputs},
    {
      'output': [str(each.path) for each in outputs],
      'allow_nonfinite': allow_nonfinite,
      'overwrite': overwrite,
      'resume': resume,
      **options,
    },
  )
  for each in outputs:
    each.demand_possible(job, options, overwrite, resume)
  if (format or job.template.format) == 'safetensors':
    companions.demand_readable(job.template)
  warnings = caveats.of_job(job)
  _log(itertools.chain(*warnings))
  facts = [provenance.describe(job, each) for each in outputs]
  with contextlib.ExitStack() as stack:
    stages = [
      stack.enter_context(
        staged(
          each.path,
          provenance.of_bits(job, each, options, fact),
          overwrite=overwrite,
          resume=resume,
        )
      )
      for each, fact in zip(outputs, facts, strict=True)
    ]
    if not allow_nonfinite:
      for stage in stages:
        stage.done = _finite(stage.done)
    # The units that need not be read for any output.
    done = frozenset.intersection(*(frozenset(each.done) for each in stages))
    _write(job, outputs, stages, facts, options, done, allow_nonfinite)
    merged = {
      each.name: summary.report(
        job,
        each,
        stage,
        described=fact,
        warnings=warnings[each.number],
        done=done,
        seconds=time.perf_counter() - start,
        format=format,
      )
      for each, stage, fact in zip(outputs, stages, facts, strict=True)
    }
    # All of them before a stage is removed: a resume can tell that the first
    # ones are done by theirs.
    for stage, report in zip(stages, merged.values(), strict=True):
      file = reports.report_path(report.output)
      stage.publish(functools.partial(report.save, file))
    for stage in stages:
      stage.clear_replaced()  # which takes a while, other than what follows
  known = {*itertools.chain(*warnings)}
  found = itertools.chain(*(each.warnings for each in merged.values()))
  _log(warning for warning in found if warning not in known)
  return merged if isinstance(output, Mapping) else merged['']


def _finite(done: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
  """Without the units in which an earlier run was to let NaN or Inf through."""
  return {
    unit: facts
    for unit, facts in done.items()
    if 'sums' not in facts or stream.are_finite(facts['sums'])
  }


def _log(warnings: Iterable[str]) -> None:
  if jax.process_index() == 0:
    for warning in dict.fromkeys(warnings):
      logging.warning('%s', warning)


def _write(
  job: Job,
  outputs: Sequence[Output],
  stages: Sequence[Stage],
  facts: Sequence[Mapping[str, Any]],
  options: Mapping[str, Any],
  done: frozenset[int],
  allow_nonfinite: bool,
) -> None:
  """Streams all merges into their stages, but for the units that are done."""
  units = [unit.number for unit in job.plan.units() if unit.written]
  # The memory of a second unit goes to the compressed copy of the first.
  behind = 0 if options['compression'] else plans.WRITE_BEHIND
  sinks = []
  with contextlib.ExitStack() as writing:
    for output, stage, fact in zip(outputs, stages, facts, strict=True):
      write = writing.enter_context(_written(job, stage, fact, options))
      keys = job.keys(output.seed)
      sinks.append(
        CheckpointSink(keys, stage.done, write, stage.record, behind)
      )
    _stream(job, stages, sinks, done, allow_nonfinite)
    for stage in stages:
      stage.demand_recorded(units)


@contextlib.contextmanager
def _written(
  job: Job, stage: Stage, fact: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[Write]:
  """Writes the checkpoint of a stage, unless it is there already."""
  if stage.complete:
    # Units that its journal has lost are merged again for their records.
    there: concurrent.futures.Future[Any] = concurrent.futures.Future()
    there.set_result(None)
    yield lambda *box: there
    return
  chunks = {
    tensor.path: reading.part_shape(tensor.boxes[0], job.plan.mesh)
    for scope in job.plan.scopes
    for tensor in scope.tensors
  }

  def write_with(produce: Callable[[Write], None]) -> None:
    write_checkpoint(
      stage.checkpoint,
      job.output_specs(),
      job.template,
      produce,
      **options,
      chunks=chunks,
      metadata={'mergekit_jax': fact},
      arrays_at=stage.arrays,
    )

  with handed_over(write_with) as write:
    yield write
  stage.seal()


def _stream(
  job: Job,
  stages: Sequence[Stage],
  sinks: Sequence[CheckpointSink],
  done: frozenset[int],
  allow_nonfinite: bool,
) -> None:
  """Merges all units, and makes sure that the sources stayed as they were."""
  with progress(job.plan, done) as advanced:
    stream.run(
      job.plan,
      job.models,
      sinks,
      done=done,
      allow_nonfinite=allow_nonfinite,
      report=True,
      advanced=advanced,
    )
  try:
    job.demand_unchanged()
  except SourceChangedError:  # not where that cannot be told
    for stage in stages:
      stage.discard()
    raise
