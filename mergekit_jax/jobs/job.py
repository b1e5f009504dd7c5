"""What is to be merged: the sources opened, compared and planned.

Everything that can be refused is refused here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from mergekit_jax import checks, processes, roots, scopes, sharding, tree
from mergekit_jax.checkpoint import Checkpoint
from mergekit_jax.jobs import sources, stacks
from mergekit_jax.kernels.random import keys_for
from mergekit_jax.planning import costs, planner
from mergekit_jax.planning import plan as plans
from mergekit_jax.streaming.reading import Model

_BESIDE_ROOT = 'nnx_aux'
_SHORT_NAMES = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}


class SourceChangedError(ValueError):
  """A source was written to while it was merged."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A merge that has been checked and planned; nothing has been read yet.

  Attributes:
    models: the sources, the base first if there is one.
    root: where the parameters begin in the output.
    plan: the plan. Its paths are those of the output.
    copied: leaves that are copied from the base.
    left_out: leaves of the base beside its parameter root, or of an optimizer.
    fingerprints: {name: fingerprint} of the sources as they were opened.
    overrides: {regex of a path: 'base' or a rule}.
    dtype: of the merged leaves; None keeps that of the first model.
  """

  models: tuple[Model, ...]
  root: str
  plan: plans.Plan
  copied: tuple[str, ...]
  left_out: tuple[str, ...]
  fingerprints: Mapping[str, str]
  overrides: Mapping[str, Any]
  dtype: jnp.dtype | None

  @property
  def template(self) -> Checkpoint:
    """The checkpoint whose structure and layout the output takes."""
    return self.models[0].checkpoint

  @property
  def experts(self) -> tuple[Model, ...]:
    return self.models[self.plan.has_base :]

  def keys(self, seed: int) -> dict[str, np.ndarray]:
    """The random key of every merged leaf, uint32 `[2]`."""
    paths = [
      tensor.path
      for scope in self.plan.scopes
      if scope.rules
      for tensor in scope.tensors
    ]
    names = [roots.mask_name(path, self.root) for path in paths]
    return dict(zip(paths, keys_for(seed, names), strict=True))

  def output_specs(self) -> Any:
    """The tree to write: the base's from its root down, nnx_aux beside.

    Of a whole tree without what optimizers keep, wherever that lies.
    """
    specs = {
      tensor.path: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
      for scope in self.plan.scopes
      for tensor in scope.tensors
    }

    holds = roots.parameters(self.template.specs, self.root)
    above = {
      '/'.join(keys[:depth])
      for keys in (path.split('/') for path in specs)
      for depth in range(1, len(keys) + 1)
    }

    def prune(node: Any, path: str) -> Any:
      name = lambda key: f'{path}/{key}' if path else str(key)
      # Strings and empty containers are in no spec.
      kept = lambda path: path in above or holds(path)
      if isinstance(node, (list, tuple)):
        return type(node)(
          prune(child, name(i)) if kept(name(i)) else None
          for i, child in enumerate(node)
        )
      if not isinstance(node, Mapping):
        return node
      return {
        key: prune(child, name(key))
        for key, child in node.items()
        if kept(name(key))
      }

    pruned = prune(self.template.tree, '')
    return jax.tree.map_with_path(
      lambda keys, leaf: specs.get(tree.path_of(keys), leaf),
      pruned,
    )

  def demand_unchanged(self) -> None:
    """Raises unless all processes find the sources as they opened them.

    Raises:
      SourceChangedError: on all processes, if a source was written to since.
      ValueError, OSError: if one of them cannot tell.
    """
    changed: list[str] = []

    def look() -> None:
      now = _fingerprints(self.models)
      changed.extend(
        f'{model.name} ({model.checkpoint.location})'
        for model in self.models
        if now[model.name] != self.fingerprints[model.name]
      )

    processes.together(look)
    if said := processes.first_told(' and '.join(changed)):
      raise SourceChangedError(
        f'{said} changed while it was read, so what was merged is thrown away. '
        'Merge again when nobody writes to it.'
      )


def make_job(
  methods: Sequence[Any],
  experts: Sequence[epath.PathLike],
  base: epath.PathLike | None,
  *,
  mesh: Mesh | None = None,
  memory_budget: int | str = '4GiB',
  stacked_axes: Mapping[str, int | tuple[int, ...]] | None = None,
  overrides: Mapping[str, Any] | None = None,
  dtype: Any = None,
  partition_rules: Mapping[str, PartitionSpec] | None = None,
  hosts: int | None = None,
) -> Job:
  """Opens, compares and plans.

  For the arguments see `merge_checkpoints`, and `planner.make_plan` for hosts.
  """
  checks.by_path('overrides', overrides)
  checks.by_path('stacked_axes', stacked_axes)
  checks.by_path('partition_rules', partition_rules)
  for method in methods:
    scopes.demand_rule('A method is a rule', method)
  methods = [_on_host(method) for method in methods]
  overrides = {regex: _on_host(x) for regex, x in (overrides or {}).items()}
  dtype = floating(dtype)
  models = sources.opened(experts, base)
  # Now: what is written to while the merge is planned has changed as well.
  fingerprints = _fingerprints(models)
  template = models[0].checkpoint
  root = roots.parameter_root(template.specs)
  reference = _specs(models[0])
  demand_short_axes(reference)
  mesh = sharding.make_mesh() if mesh is None else sharding.auto_mesh(mesh)
  sharding.demand_all_processes(mesh)
  merged = tree.merged_shapes(reference)
  if stacked_axes is None:
    stacked_axes = stacks.known(template.metadata, merged)
  stacked = tree.stacked_axes(stacked_axes, merged)
  others = {model.name: _specs(model) for model in models[1:]}
  groups = scopes.agreed(methods, overrides, reference, others, template.specs)
  copied = _copied(models[0], root, groups)
  models[0] = dataclasses.replace(
    models[0], paths={**models[0].paths, **{path: path for path in copied}}
  )
  left_out = {*template.specs} - {*models[0].paths.values()}
  planned = [
    (rules, [_leaf(path, models, stacked, dtype) for path in paths])
    for rules, paths in groups
  ]
  _demand_whole_bytes([leaf for _, leaves in planned for leaf in leaves])
  if copied:
    planned.append(((), [_leaf(path, models[:1], stacked) for path in copied]))
  plan = planner.make_plan(
    planned,
    mesh,
    memory_budget=checks.size('memory_budget', memory_budget),
    has_base=base is not None,
    partition_rules=partition_rules,
    decoding_bytes=sum(model.checkpoint.decoding_bytes for model in models),
    merges=len(methods),
    hosts=hosts,
  )
  if plan.rounds and hosts is None:
    sharding.host_device()
  return Job(
    tuple(models),
    root,
    plan,
    tuple(copied),
    tuple(sorted(left_out)),
    fingerprints,
    overrides,
    dtype,
  )


def demand_short_axes(specs: Mapping[str, jax.ShapeDtypeStruct]) -> None:
  """Refuses axes along which 32 bits cannot say where a box begins."""
  for path, spec in specs.items():
    if max(spec.shape, default=0) >= 2**31:
      raise ValueError(
        f'{path} has shape {spec.shape}; an axis of 2**31 elements or more is '
        'not supported. Store it with more axes.'
      )


def _demand_whole_bytes(leaves: Sequence[costs.Leaf]) -> None:
  """Refuses to merge floats of which several may share a byte."""
  bits = functools.cache(lambda dtype: jnp.finfo(dtype).bits)
  for leaf in leaves:
    for dtype in (*leaf.sources, leaf.dtype):
      if bits(dtype) < 8:
        raise ValueError(
          f'{leaf.path} is read or written as {dtype}, and floats of less than '
          '8 bits are not merged. Convert it, or keep it as the base has it: '
          "overrides={'regular expression of its path': 'base'}."
        )


def floating(dtype: Any) -> Any:
  """The dtype of the merged leaves; None stays None."""
  if dtype is None:
    return None
  name = _SHORT_NAMES.get(dtype, dtype) if isinstance(dtype, str) else None
  with contextlib.suppress(TypeError):  # a name that is no dtype
    known = jnp.dtype(name or dtype)
    # To numpy 'f8' is float64, of 8 bytes. JAX has no floats of more.
    by_its_name = name in (None, known.name)
    if by_its_name and tree.is_merged(known) and known.itemsize <= 8:
      return known
  raise ValueError(
    f'dtype={dtype!r} was given; give a floating-point dtype by its whole '
    "name, such as 'float32' or 'float8_e4m3fn', or "
    f'{", ".join(_SHORT_NAMES)}.'
  )


def _on_host(rule: Any) -> Any:
  """The same rule without numbers that lie on devices.

  A number that was learned may be committed to devices other than the mesh's.
  """
  return jax.tree.map(
    lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, rule
  )


def _fingerprints(models: Sequence[Model]) -> dict[str, str]:
  return {each.name: each.checkpoint.fingerprint() for each in models}


def _specs(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    path: model.checkpoint.specs[full] for path, full in model.paths.items()
  }


def _copied(
  first: Model, root: str, groups: Sequence[scopes.Group]
) -> list[str]:
  """Leaves of the first source that are in the output as they are."""
  covered = {path for _, paths in groups for path in paths}
  copied = [path for path in first.paths if path not in covered]
  if root:
    beside = [p for p in first.checkpoint.specs if roots.below(_BESIDE_ROOT, p)]
    copied += [path for path in beside if path not in first.paths]
  return copied


def _leaf(
  path: str,
  models: Sequence[Model],
  stacked: Mapping[str, tuple[int, ...]],
  dtype: Any = None,
) -> costs.Leaf:
  """What the plan needs to know of a leaf.

  Args:
    path: its path in the output.
    models: those of which it is read.
    stacked: the stacked axes of the leaves that are merged.
    dtype: of the output; None keeps that of the first model.
  """
  specs = [model.checkpoint.specs[model.paths[path]] for model in models]
  storage = [model.checkpoint.storage(model.paths[path]) for model in models]
  chunks = [s.chunk for s in storage if s.compressed]
  return costs.Leaf(
    path,
    specs[0].shape,
    tuple(spec.dtype for spec in specs),
    jnp.dtype(dtype or specs[0].dtype),
    stacked.get(path, ()),
    tuple(map(max, zip(*chunks, strict=True))) if chunks else None,
    storage[0].chunk,
  )
