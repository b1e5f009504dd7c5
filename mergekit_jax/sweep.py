"""Many merges from one read, handed to a function instead of written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import functools
import itertools
import os
from typing import Any, cast

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from mergekit_jax import checks, scopes, sharding
from mergekit_jax.driving.block import as_floats
from mergekit_jax.jobs import caveats, provenance
from mergekit_jax.jobs.job import Job, make_job
from mergekit_jax.merge import merge
from mergekit_jax.planning.plan import Tensor
from mergekit_jax.streaming import stream
from mergekit_jax.streaming.progress import progress
from mergekit_jax.streaming.reading import Loading
from mergekit_jax.tree import path_of


def sweep(
  methods: Mapping[str, Any],
  experts: Sequence[Any],
  base: Any,
  evaluate: Callable[[Any], Any],
  *,
  seed: int | Mapping[str, int] = 0,
  stacked_axes: Mapping[str, int | tuple[int, ...]] | None = None,
  overrides: Mapping[str, Any] | None = None,
  mesh: Mesh | None = None,
  memory_budget: int | str = '4GiB',
  partition_rules: Mapping[str, PartitionSpec] | None = None,
  allow_nonfinite: bool = False,
) -> dict[str, Any]:
  """Merges by many methods and gives what a function says of each merge.

  Checkpoints are read as often as the method with the most rounds asks for,
  however many methods there are. All merges are then on the mesh at once,
  sharded over it. Trees in memory are merged one method at a time.

  Args:
    methods: {name: rule}, such as one rule with several values of a number.
    experts: checkpoints of the experts, or their trees.
    base: the checkpoint or tree of the base, or None.
    evaluate: called with each merged tree of arrays, which is let go of
      afterwards. Its JAX arrays are its own, so it may donate them.
    seed: seed of the random numbers, or {name: seed}.
    stacked_axes: as in `merge_checkpoints`.
    overrides: as in `merge_checkpoints`.
    mesh: the devices, for checkpoints; None takes all, on one axis. The merges
      are handed out on it as it is, be its axes Explicit or Auto.
    memory_budget: host memory for reading checkpoints, beside the merges.
    partition_rules: as in `merge_checkpoints`, for checkpoints; how the merges
      are sharded.
    allow_nonfinite: let NaN and Inf in checkpoints through, as those in trees
      are.

  Returns:
    {name: what `evaluate` returned}, in the order of `methods`.

  Raises:
    ValueError: if an argument or a source does not fit, and nothing was read;
      or, afterwards, if a source has changed.
    TypeError: if a rule returns no floating-point array, or a `then` uses what
      it must not.
    FloatingPointError: if a checkpoint holds NaN or Inf, unless allowed.
    OSError: if a checkpoint cannot be read.
  """
  if not isinstance(methods, Mapping):
    raise ValueError(
      f'methods is a {type(methods).__name__}; give {{name: rule}}.'
    )
  checks.some_rules('methods', methods)
  if not callable(evaluate):
    raise ValueError(
      f'evaluate={evaluate!r} was given; give a function, which is called with '
      'each merged tree.'
    )
  seeds = seed if isinstance(seed, Mapping) else dict.fromkeys(methods, seed)
  if seeds.keys() != methods.keys():
    raise ValueError(
      f'methods names {list(methods)} and seed {list(seeds)}; give a seed for '
      'each or one for all.'
    )
  seeds = {name: checks.seed('seed', given) for name, given in seeds.items()}
  experts = checks.experts(experts)
  if isinstance(experts[0], (str, os.PathLike)):
    job = make_job(
      list(methods.values()),
      experts,
      base,
      mesh=mesh,
      memory_budget=memory_budget,
      stacked_axes=stacked_axes,
      overrides=overrides,
      partition_rules=partition_rules,
    )
    told = {'allow_nonfinite': allow_nonfinite}
    provenance.demand_agreement(job, methods, seeds, told)
    if jax.process_index() == 0:
      for warning in dict.fromkeys(itertools.chain(*caveats.of_job(job))):
        logging.warning('%s', warning)
    trees = _streamed(
      job,
      job.plan.mesh if mesh is None else mesh,
      [seeds[name] for name in methods],
      allow_nonfinite,
    )
  else:
    if mesh is not None or partition_rules is not None:
      raise ValueError(
        'mesh and partition_rules are for checkpoints; the merge of trees is '
        'sharded as they are.'
      )
    for method in methods.values():
      scopes.demand_rule('A method is a rule', method)
    trees = (
      _apart(
        merge(
          method,
          experts,
          base,
          key=seeds[name],
          stacked_axes=stacked_axes,
          overrides=overrides,
        ),
        base if base is not None else experts[0],
      )
      for name, method in methods.items()
    )
  # No name holds on to a tree while the next one is made.
  return {name: _evaluated(evaluate, name, next(trees)) for name in methods}


def _apart(merged: Any, template: Any) -> Any:
  """The merge with copies of the JAX arrays that are the template's.

  An `evaluate` that donates them would take them from the next merge.
  """
  return jax.tree.map(
    lambda leaf, of: (
      jnp.copy(leaf) if leaf is of and isinstance(leaf, jax.Array) else leaf
    ),
    merged,
    template,
  )


def _evaluated(evaluate: Callable[[Any], Any], name: str, tree: Any) -> Any:
  try:
    return evaluate(tree)
  except Exception as error:
    error.add_note(f'So evaluate ended for the merge {name!r}.')
    raise


def _streamed(
  job: Job, mesh: Mesh, seeds: Sequence[int], allow_nonfinite: bool
) -> Iterator[Any]:
  sinks = [_TreeSink(job, seed) for seed in seeds]
  with progress(job.plan, ()) as advanced:
    stream.run(
      job.plan,
      job.models,
      sinks,
      done=(),
      allow_nonfinite=allow_nonfinite,
      report=False,
      advanced=advanced,
    )
  job.demand_unchanged()
  while sinks:
    yield sinks.pop(0).tree(mesh)


class _TreeSink:
  """Puts the boxes of a merge together on the mesh (`stream.Sink`)."""

  done: Collection[int] = ()

  def __init__(self, job: Job, seed: int):
    self.keys: Mapping[str, np.ndarray] = job.keys(seed)
    self._job = job
    self._mesh = job.plan.mesh
    self._leaves: dict[str, jax.Array] = {}

  def take(
    self, loading: Loading, merged: jax.Array, facts: Mapping[str, Any]
  ) -> None:
    del facts
    # The mesh that the caller has set may be of other devices.
    with jax.set_mesh(self._mesh):
      self._put(loading, merged)

  def _put(self, loading: Loading, merged: jax.Array) -> None:
    tensor, box = loading.unit.tensor, loading.unit.box
    if len(tensor.boxes) == 1:
      # XLA may hand an input on as the output, and its buffer is reused.
      placed = NamedSharding(self._mesh, box.spec)
      leaf = _copied(merged, tensor.shape, tensor.dtype, placed)
    else:
      leaf = self._leaves.get(tensor.path)
      if leaf is None:
        leaf = _zeros(tensor, box.spec, self._mesh)
      origin = [np.int32(start) for start in box.origin]
      with jax.enable_x64(tensor.dtype.itemsize == 8):
        leaf = _updated(leaf, merged, origin, box.shape)
    # What it reads is read into again once this returns.
    self._leaves[tensor.path] = jax.block_until_ready(leaf)

  def copy(self, loading: Loading) -> None:
    with jax.enable_x64(True):
      box = loading.unit.box
      placed = NamedSharding(self._mesh, box.spec)
      self.take(loading, loading.array(0, placed, box.shape), {})

  def finish(self) -> None:
    """Nothing is under way but on the devices."""

  def settle(self) -> None:
    """Nothing is kept after an error."""

  def tree(self, mesh: Mesh) -> Any:
    """The merged model, in the structure of the base, on the mesh as given."""
    layout = self._job.template.layout
    random_keys = layout.random_keys if layout else {}

    def filled(keys: Any, leaf: Any) -> Any:
      path = path_of(keys)
      leaf = self._leaves.pop(path, leaf)
      if isinstance(leaf, jax.Array):
        # Nothing moves: only the types of the axes differ.
        spec = cast(NamedSharding, leaf.sharding).spec
        leaf = jax.device_put(leaf, NamedSharding(mesh, spec))
      if path not in random_keys:
        return leaf
      return jax.random.wrap_key_data(leaf, impl=random_keys[path])

    with jax.set_mesh(mesh):
      return jax.tree.map_with_path(filled, self._job.output_specs())


def _zeros(tensor: Tensor, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
  """A leaf before its first box, spread as that is wherever it divides."""
  counts = sharding.shards(spec, len(tensor.shape), mesh)
  even = [n % count == 0 for n, count in zip(tensor.shape, counts, strict=True)]
  placed = NamedSharding(mesh, sharding.spread_along(spec, even))
  with jax.enable_x64(tensor.dtype.itemsize == 8):
    return jnp.zeros(tensor.shape, tensor.dtype, device=placed)


@functools.partial(jax.jit, donate_argnums=0, static_argnames='shape')
def _updated(
  leaf: jax.Array, bits: jax.Array, origin: Sequence[int], shape: Sequence[int]
) -> jax.Array:
  box = as_floats(bits, leaf.dtype).reshape(shape)
  return jax.lax.dynamic_update_slice(leaf, box, list(origin))


@functools.partial(jax.jit, static_argnames=('shape', 'dtype', 'placed'))
def _copied(
  bits: jax.Array, shape: Sequence[int], dtype: jnp.dtype, placed: NamedSharding
) -> jax.Array:
  leaf = jnp.array(as_floats(bits, dtype).reshape(shape), copy=True)
  return jax.lax.with_sharding_constraint(leaf, placed)
