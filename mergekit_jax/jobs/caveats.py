"""What is warned of before a merge of checkpoints reads anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

import numpy as np

from mergekit_jax import doubts, roots, tree
from mergekit_jax.checkpoint import companions
from mergekit_jax.checkpoint.remote import real_path
from mergekit_jax.driving import questions
from mergekit_jax.stages.sparsifiers import Drop, Trim

if TYPE_CHECKING:
  from mergekit_jax.jobs.job import Job
  from mergekit_jax.planning.plan import Plan
  from mergekit_jax.streaming.reading import Model


def of_job(job: Job) -> list[list[str]]:
  """All warnings that need no values of the models, of each merge."""
  shared = _of_sources(job)
  experts = len(job.experts)
  return [
    [*of_plan(job.plan, experts, number), *shared]
    for number in range(job.plan.merges)
  ]


def of_plan(plan: Plan, experts: int, number: int) -> list[str]:
  """Those of them that need no models.

  Args:
    plan: the plan.
    experts: how many are merged.
    number: of the merge.
  """
  rules = [scope.rules[number] for scope in plan.scopes if scope.rules]
  return [*_merged_as_one(plan, experts, number), *_trims_nothing(rules)]


def _merged_as_one(plan: Plan, experts: int, number: int) -> list[str]:
  """Of leaves that may hold several layers."""
  groups = [
    (
      scope.rules[number],
      {t.path: t.shape for t in scope.tensors if not t.stacked},
    )
    for scope in plan.scopes
    if scope.rules
  ]
  paths = []
  for rule, shapes in groups:
    matters = {}  # by number of dimensions
    for path, shape in shapes.items():
      if tree.looks_stacked(path, shape):
        rank = len(shape)
        if rank not in matters:
          matters[rank] = questions.tells_layers_apart(rule, experts, rank)
        paths += [path] * matters[rank]
  if not paths:
    return []
  if len(paths) == 1:
    which = (
      f'1 tensor below "layers", {paths[0]}, is merged as one. If it holds'
    )
  else:
    which = (
      f'{len(paths)} tensors below "layers", such as {paths[0]}, are merged as '
      'one tensor each. If they hold'
    )
  return [
    f'{which} stacked layers, give their axis by stacked_axes; for thresholds '
    'of a tensor and random masks that matters.'
  ]


def _trims_nothing(rules: Sequence[Any]) -> list[str]:
  """Of a density that a drop before it has made pointless."""
  warnings = {}
  for rule in rules:
    left = 1.0
    for stage in getattr(rule, 'stages', ()):
      if isinstance(stage, Drop):
        left *= 1 - np.asarray(stage.drop_rate).item()
      elif isinstance(stage, Trim) and left < 1:
        density = np.asarray(stage.density).item()
        # As it is rounded.
        if round(1e6 * density) >= round(1e6 * left):
          warnings[density, left] = (
            f'density={density:g} trims next to nothing: the drop before it '
            f'leaves about {left:g} of the entries, and a density counts the '
            'dropped ones too. Give less than that, or leave it out and save '
            'what it takes.'
          )
  return [*warnings.values()]


def _of_sources(job: Job) -> list[str]:
  specs = job.models[0].checkpoint.specs
  paths = job.models[0].paths
  read = {path: specs[paths[path]] for path in paths}
  merged = [
    tensor.path
    for scope in job.plan.scopes
    if scope.rules
    for tensor in scope.tensors
  ]
  return [
    *_nothing(merged),
    *_twice(job.experts),
    *_items(job.template.items_beside),
    *_companions(job.models),
    *doubts.left_out(specs, job.left_out, job.root, 'in the output'),
    *doubts.of_copied(read, job.copied),
    *doubts.of_merged({path: read[path].shape for path in merged}, job.root),
    *doubts.of_wide({path: read[path] for path in merged}),
  ]


def _nothing(merged: Sequence[str]) -> list[str]:
  return [] if merged else ['Nothing is merged: all is as the base has it.']


def _twice(experts: Sequence[Model]) -> list[str]:
  """Of experts that are one checkpoint, which then counts twice."""
  first: dict[Any, str] = {}
  warnings = []
  for expert in experts:
    place = real_path(expert.checkpoint.location)
    if place in first:
      warnings.append(
        f'{expert.name} is {first[place]} once more ({place}), and counts as '
        'often as it is given.'
      )
    first.setdefault(place, expert.name)
  return warnings


def _items(names: Sequence[str]) -> list[str]:
  """Of items beside the one with the parameters."""
  return [
    f'The item {name} of the base lies beside its parameters and is not in the '
    'output.'
    for name in names
    if roots.may_be_needed(name)
  ]


def _companions(models: Sequence[Model]) -> list[str]:
  """Of what lies beside the weights of others, and is copied from the first."""
  first, *others = models
  if first.checkpoint.format != 'safetensors':
    return []
  there = companions.needed(first.checkpoint)
  for other in others:
    kinds = companions.needed(other.checkpoint)
    if missing := [kind for kind in kinds if kind not in there]:
      return [
        f'{first.name} ({first.checkpoint.path}) has no '
        f'{" and no ".join(missing)}, which {other.name} '
        f'({other.checkpoint.path}) has. They are copied from {first.name} '
        'alone, so transformers may not load the output, or not use it in the '
        f'same way: copy them to {first.name} first.'
      ]
  return []
