"""What an output is made of, which a resume must agree with."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import importlib.metadata
import re
from typing import Any

import jax
import numpy as np

from mergekit_jax import processes
from mergekit_jax.driving import questions
from mergekit_jax.driving.block import stand_in_shape
from mergekit_jax.jobs.job import Job
from mergekit_jax.jobs.outputs import Output
from mergekit_jax.rule import needs_of
from mergekit_jax.version import __version__


def describe(job: Job, output: Output) -> dict[str, Any]:
  """What an output was made of and how, as JSON can hold it.

  Args:
    job: the merge.
    output: which of its outputs.
  """
  tensors = [t for scope in job.plan.scopes for t in scope.tensors]
  return {
    'method': _told(output.method),
    'overrides': {key: _told(rule) for key, rule in job.overrides.items()},
    'seed': output.seed,
    'stacked_axes': {t.path: list(t.stacked) for t in tensors if t.stacked},
    'dtype': None if job.dtype is None else str(job.dtype),
    'sources': {
      model.name: {
        'path': str(model.checkpoint.location.absolute()),
        'fingerprint': job.fingerprints[model.name],
      }
      for model in job.models
    },
    'mesh': dict(job.plan.mesh.shape),
    'versions': _versions(),
  }


def demand_agreement(
  job: Job,
  methods: Mapping[str, Any],
  seeds: Mapping[str, int],
  options: Mapping[str, Any],
) -> None:
  """Raises unless all processes were told the same and found the same.

  Sources may be copies, so their fingerprints are not compared.

  Args:
    job: the merge.
    methods: the rules by name.
    seeds: by the same names.
    options: anything else, by name.

  Raises:
    ValueError, OSError: see `processes.demand_agreement`.
  """
  if jax.process_count() == 1:
    return
  rules = {'method': methods, 'overrides': job.overrides}
  told = {**rules, 'seed': seeds, **options}
  processes.demand_agreement(
    {
      **{name: _told(value) for name, value in told.items()},
      'numbers of the method': _numbers(methods, job),
      **{m.name: str(m.checkpoint.location) for m in job.models},
      'mesh, memory_budget, partition_rules, stacked_axes or versions': repr(
        [job.plan.units_digest, _versions()]
      ),
    }
  )


def of_bits(
  job: Job,
  output: Output,
  options: Mapping[str, Any],
  described: Mapping[str, Any],
) -> dict[str, Any]:
  """What decides the bits of an output: a resume must agree with it.

  Args:
    job: the merge.
    output: which of its outputs.
    options: of the output's format.
    described: from `describe`. Each source is named apart, so that one that
      has changed is.
  """
  named = dict(described)
  sources = named.pop('sources')
  return {
    **named,
    # Wherever it lies, and however its path is written.
    **{
      f'source {name}': source['fingerprint']
      for name, source in sources.items()
    },
    'numbers': _numbers(output.method, job),
    'code of the method': _code(job, output),
    'units': job.plan.units_digest,
    'memory_budget': job.plan.memory_budget,
    'processes': jax.process_count(),
    'layout': str(job.template.layout),
    **options,
    'format': options['format'] or job.template.format,
  }


def _versions() -> dict[str, str]:
  packages = ('jax', 'orbax-checkpoint', 'tensorstore')
  return {
    'mergekit_jax': __version__,
    **{name: importlib.metadata.version(name) for name in packages},
  }


def _told(value: Any) -> str:
  """As text, without addresses: a rule may hold a function."""
  return re.sub(r' at 0x[0-9a-f]+', '', repr(value))


def _code(job: Job, output: Output) -> str:
  """A digest of what rules compute: their names stay when they are edited.

  Of this library's own the version tells, and finding it takes a while.
  """
  stand_ins = {}
  for scope in job.plan.scopes:
    for tensor in scope.tensors if scope.rules else ():
      rule = scope.rules[output.number]
      if not _is_ours(rule):
        shape = stand_in_shape(needs_of(rule), tensor.shape, tensor.stacked)
        stand_ins[id(rule), shape] = rule, shape
  key = jax.ShapeDtypeStruct((2,), np.uint32)
  state = hashlib.blake2b(digest_size=16)
  for rule, shape in stand_ins.values():
    block = questions.stand_in(shape, len(job.experts), job.plan.has_base, key)
    state.update(questions.program(rule, block).encode())
  return state.hexdigest()


def _is_ours(rule: Any) -> bool:
  parts = (rule, *getattr(rule, 'stages', ()))
  return all(type(x).__module__.startswith('mergekit_jax.') for x in parts)


def _numbers(methods: Any, job: Job) -> str:
  """A digest: as text they are rounded, and long ones are cut short."""
  leaves = jax.tree.leaves((methods, job.overrides))
  data = b''.join(np.asarray(leaf).tobytes() for leaf in leaves)
  return hashlib.blake2b(data, digest_size=16).hexdigest()
