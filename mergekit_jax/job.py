"""What is to be merged: the sources opened, compared and planned.

Everything that can be refused is refused here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mergekit_jax import checks, planner, scopes, sharding, tree
from mergekit_jax import plan as plans
from mergekit_jax.checkpoint import Checkpoint, open_checkpoint
from mergekit_jax.reading import Model
from mergekit_jax.report import readable

_BESIDE_ROOT = 'nnx_aux'


@dataclasses.dataclass(frozen=True)
class Job:
  """A merge that has been checked and planned; nothing has been read yet.

  Attributes:
    method: the rule.
    models: the sources, the base first if there is one.
    has_base: whether there is one.
    root: where the parameters begin in the output.
    plan: the plan. Its paths are those of the output.
    copied: leaves that are copied from the base.
    left_out: leaves of the base beside its parameter root.
  """

  method: Any
  models: tuple[Model, ...]
  has_base: bool
  root: str
  plan: plans.Plan
  copied: tuple[str, ...]
  left_out: tuple[str, ...]

  @property
  def template(self) -> Checkpoint:
    """The checkpoint whose structure and layout the output takes."""
    return self.models[0].checkpoint

  def describe(self) -> str:
    """What the merge will read, write and need, for people."""
    plan = self.plan
    tensors = [t for scope in plan.scopes for t in scope.tensors]
    worst = max(tensors, key=lambda t: t.amplification, default=None)
    lines = [
      f'{"tensor":60} {"shape":20} {"boxes":>5} {"reads":>5}  sharding',
      *(
        f'{t.path:60} {str(list(t.shape)):20} {len(t.boxes):5} '
        f'{1 if t.read_once else scope.rounds + 1:5}  {t.boxes[0].spec}'
        for scope in plan.scopes
        for t in scope.tensors
      ),
      f'{len(tensors) - len(self.copied)} tensors merged, '
      f'{len(self.copied)} copied, {sum(1 for _ in plan.units())} units',
      f'rounds: {plan.rounds}',
      f'bytes read: {readable(plan.bytes_read)}',
      f'bytes written: {readable(plan.bytes_written)}',
      f'host memory: {readable(plan.host_bytes)} of a budget of '
      f'{readable(plan.memory_budget)}, beside imports and runtime',
    ]
    if worst is not None and worst.amplification > 1:
      lines.append(
        f'compressed chunks: up to {worst.amplification:.2f} bytes decoded for '
        f'each byte used ({worst.path})'
      )
    return '\n'.join(lines)


def make_job(
  method: Any,
  experts: Sequence[epath.PathLike],
  base: epath.PathLike | None,
  *,
  mesh: Mesh | None = None,
  memory_budget: int | str = '4GiB',
  stacked_axes: Mapping[str, int | tuple[int, ...]] | None = None,
  overrides: Mapping[str, Any] | None = None,
  dtype: Any = None,
  partition_rules: Mapping[str, PartitionSpec] | None = None,
) -> Job:
  """Opens, compares and plans. For the arguments see `merge_checkpoints`."""
  scopes.demand_rule('A method is a rule', method)
  if isinstance(experts, (str, bytes)) or not experts:
    raise ValueError(
      f'experts={experts!r} was given; give a list of at least one checkpoint.'
    )
  dtype = _floating(dtype)
  named = [('base', base)] if base is not None else []
  named += [(f'experts[{i}]', path) for i, path in enumerate(experts)]
  opened = [(name, open_checkpoint(path)) for name, path in named]
  template = opened[0][1]
  root = tree.parameter_root(template.specs)
  models = [_model(name, checkpoint, root) for name, checkpoint in opened]
  reference = _specs(models[0])
  tree.demand_same(
    reference, {model.name: _specs(model) for model in models[1:]}
  )
  mesh = sharding.make_mesh() if mesh is None else sharding.auto_mesh(mesh)
  merged = {
    path: spec.shape
    for path, spec in reference.items()
    if tree.is_merged(spec.dtype)
  }
  if stacked_axes is None:
    stacked_axes = _known_stacks(template, merged)
  stacks = tree.stacked_axes(stacked_axes, merged)
  groups = scopes.group(method, overrides, merged)
  covered = {path for _, paths in groups for path in paths}
  copied = [path for path in reference if path not in covered]
  beside = [p for p in template.specs if tree.below(_BESIDE_ROOT, p)]
  copied += [path for path in beside if root and path not in reference]
  left_out = set(template.specs) - {*models[0].paths.values(), *copied}
  models[0] = dataclasses.replace(
    models[0], paths={**models[0].paths, **{path: path for path in copied}}
  )

  def leaf(path: str, sources: Sequence[Model]) -> planner.Leaf:
    specs = [model.checkpoint.specs[model.paths[path]] for model in sources]
    storage = [model.checkpoint.storage(model.paths[path]) for model in sources]
    chunks = [s.chunk for s in storage if s.compressed]
    converted = dtype if path in covered else None
    return planner.Leaf(
      path,
      specs[0].shape,
      tuple(spec.dtype for spec in specs),
      jnp.dtype(converted or specs[0].dtype),
      stacks.get(path, ()),
      tuple(map(max, *chunks, chunks[0])) if chunks else None,
    )

  planned = [(rule, [leaf(p, models) for p in paths]) for rule, paths in groups]
  if copied:
    planned.append((None, [leaf(path, models[:1]) for path in copied]))
  plan = planner.make_plan(
    planned,
    mesh,
    checks.size('memory_budget', memory_budget),
    base is not None,
    partition_rules,
    sum(model.checkpoint.decoding_bytes for model in models),
  )
  return Job(
    method,
    tuple(models),
    base is not None,
    root,
    plan,
    tuple(copied),
    tuple(sorted(left_out)),
  )


def _floating(dtype: Any) -> Any:
  """The dtype of the merged leaves; None stays None."""
  if dtype is None:
    return None
  with contextlib.suppress(TypeError):  # a name that is no dtype
    if tree.is_merged(jnp.dtype(dtype)):
      return jnp.dtype(dtype)
  raise ValueError(
    f'dtype={dtype!r} was given; give a floating-point dtype such as '
    "'float32' or 'bfloat16'."
  )


def _model(name: str, checkpoint: Checkpoint, root: str) -> Model:
  """A source whose leaves are called by their paths in the output."""
  own = tree.parameter_root(checkpoint.specs)
  prefix = f'{root}/' if root else ''
  paths = {
    prefix + (path[len(own) + 1 :] if own else path): path
    for path in checkpoint.specs
    if tree.below(own, path)
  }
  return Model(name, checkpoint, paths)


def _specs(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    path: model.checkpoint.specs[full] for path, full in model.paths.items()
  }


def _known_stacks(
  checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int] | None:
  """The stacked axes of a layout that says of itself how it is stacked.

  MaxText scans its layers over axis 1 and says so in its metadata.
  """
  # As text where it has been through safetensors, whose metadata is text.
  if checkpoint.metadata.get('scan_layers') not in (True, 'true'):
    return None
  regex = r'.*/(\w+_)?layers/.*'
  layered = [path for path in shapes if re.fullmatch(regex, path)]
  return {re.escape(path): 1 for path in layered if len(shapes[path]) > 1}
