"""The merge of pytrees in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
from typing import Any
import warnings

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from mergekit_jax import checks, doubts, roots, scopes, sharding, tree
from mergekit_jax.driving.block import Block
from mergekit_jax.driving.drive import run
from mergekit_jax.kernels.random import key_for
from mergekit_jax.rule import PyTree


def merge(
  method: Any,
  experts: Sequence[PyTree],
  base: PyTree | None = None,
  *,
  key: jax.Array | int | None = None,
  stacked_axes: Mapping[str, int | tuple[int, ...]] | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> PyTree:
  """Merges experts of one base model, pytrees in and a pytree out.

  An ordinary JAX function: it works on sharded arrays and under `jax.jit`,
  `jax.grad` and `jax.vmap`, compiles once per shape of a leaf, and does not
  recompile when a hyperparameter changes. Floating-point leaves are merged in
  float32 and rounded once to the base's dtype; other leaves are the base's.
  Non-finite values propagate.

  Of a whole training state what `merge_checkpoints` would merge is merged, with
  the same bits: the leaves below its parameter root. What lies beside it, an
  optimizer's state or batch statistics, stays as the base has it; to merge it
  too, merge it by itself, of an optimizer its moments, as in
  `[state[0].mu for state in states]`.

  Under `jax.shard_map` and `jax.pmap` every part is a merge of its own: totals
  such as the threshold of TIES, and random masks, are those of the part. Give
  whole arrays with shardings to merge them as one model.

  Args:
    method: a merge rule, such as `mergekit_jax.ties(density=0.2)`.
    experts: the fine-tuned models, trees of arrays of one structure.
    base: the model they were fine-tuned from; may be None for methods that work
      without task vectors, such as `average`.
    key: a JAX random key, or an int seed, for methods that draw random numbers.
    stacked_axes: {regex of a path: axis or axes} of leaves that hold several
      layers: every layer slice is a tensor of its own.
    overrides: {regex of a path: 'base' or a rule} for leaves that are not to be
      merged by `method`; the first match wins, and every rule is a scope of its
      own. As the 'base' has it, or the first expert where there is no base, a
      leaf may differ in the experts; one that only experts have is then left
      out.

  Returns:
    The merged model, in the structure, dtypes and shardings of the base; or of
    the first expert, if there is no base. Where nobody has placed that one, as
    arrays of numpy, the merge lies where the experts do. Merged leaves are JAX
    arrays, so that 64-bit ones need `jax_enable_x64` to stay so. Leaves that
    are not merged are the very arrays of the base: a step that donates the
    merge deletes them there, so copy them first.

  Raises:
    ValueError: if there are no experts, the trees differ, a rule by path
      matches nothing, the method needs a base or a key that was not given, or
      what it returns has not the shape of the tensor and is no scalar.
    TypeError: if it returns no floating-point array, or a `then` uses what it
      must not.
  """
  scopes.demand_rule('A method is a rule', method)
  experts = checks.experts(experts)
  checks.by_path('overrides', overrides)
  checks.by_path('stacked_axes', stacked_axes)
  if any(isinstance(x, (str, os.PathLike)) for x in (*experts, base)):
    raise ValueError(
      'A path was given; base and experts are trees of arrays here. For '
      'checkpoints call mergekit_jax.merge_checkpoints.'
    )
  template, structure = tree.flatten(base if base is not None else experts[0])
  known = _specs(template)
  root = roots.parameter_root(known)
  named = {
    f'experts[{i}]': tree.flatten(expert)[0] for i, expert in enumerate(experts)
  }
  models = {name: _parameters(name, x, root) for name, x in named.items()}
  first = _parameters('base', template, root) if base is not None else None
  specs = _specs(models['experts[0]'] if first is None else first)
  key = None if key is None else _key(key)

  shapes = tree.merged_shapes(specs)
  stacked = tree.stacked_axes(stacked_axes, shapes)
  others = {name: _specs(model) for name, model in models.items()}
  groups = scopes.agreed([method], overrides, specs, others, template)
  covered = [path for _, paths in groups for path in paths]

  # Without 64-bit types the merge is in float32 too, which is seen.
  wide = covered if jnp.result_type(float) == jnp.float64 else []
  beside = [path for path in tree.merged_shapes(known) if path not in specs]
  for doubt in [
    *doubts.left_out(known, beside, root, 'merged'),
    *doubts.of_copied(specs, [p for p in specs if p not in covered]),
    *doubts.of_merged({path: shapes[path] for path in covered}, root),
    *doubts.of_wide({path: specs[path] for path in wide}),
  ]:
    warnings.warn(doubt, stacklevel=2)

  # Once each: arrays of numpy are copied to a device.
  pick = lambda model: {path: jnp.asarray(model[path]) for path in covered}
  picked = [pick(model) for model in models.values()]
  like = picked[0] if base is None else pick(template)

  # An argument, like the arrays: what is closed over keeps its own mesh.
  def merge_leaves(rules, base, experts, key):
    def block(path: str) -> Block:
      return Block(
        base=None if base is None else base[path],
        experts=[expert[path] for expert in experts],
        key=None if key is None else key_for(key, roots.mask_name(path, root)),
        origin=(0,) * len(shapes[path]),
        whole=shapes[path],
        stacked=stacked[path],
        dtype=like[path].dtype,
      )

    return {
      path: value
      for rule, (_, paths) in zip(rules, groups, strict=True)
      for path, value in zip(
        paths, run(rule, [*map(block, paths)]), strict=True
      )
    }

  merged = sharding.with_auto_axes(
    merge_leaves,
    like,
    [jax.tree.map(_number, rule) for (rule,), _ in groups],
    like if base is not None else None,
    picked,
    key,
  )
  return jax.tree.unflatten(structure, {**template, **merged}.values())


def _parameters(
  name: str, leaves: Mapping[str, Any], root: str
) -> dict[str, Any]:
  """The leaves that a merge of checkpoints would look at, by their paths there.

  Args:
    name: what to call the model.
    leaves: all of it, by path.
    root: where the parameters begin in the merge.

  Raises:
    ValueError: if all that could be merged is of an optimizer.
  """
  specs = _specs(leaves)
  paths = roots.moved(specs, root)
  if leaves:
    roots.demand_parameters(name, specs, paths)
  return {path: leaves[own] for path, own in paths.items()}


def _key(given: Any) -> jax.Array:
  """A random key from one, or from a seed."""
  if not isinstance(given, (jax.Array, np.ndarray)):
    given = checks.seed('key', given)
  elif given.ndim or not jnp.issubdtype(given.dtype, jnp.integer):
    is_key = not given.ndim and jnp.issubdtype(given.dtype, jax.dtypes.prng_key)
    if not is_key and (given.shape, given.dtype) != ((2,), jnp.uint32):
      raise ValueError(
        f'key is {given.dtype}{list(given.shape)}; give one key, such as '
        'jax.random.key(0), or a seed. Of several, map over them (jax.vmap).'
      )
    return jnp.asarray(given)
  elif not isinstance(given, Tracer):
    given = checks.seed('key', given.item())
  return jax.random.key(given, impl='threefry2x32')


def _number(leaf: Any) -> Any:
  """A number of a rule; of what `jax.jvp` makes of Python's, the dtype stays.

  Totals are answered in 64 bits, where a Python number would have as many.
  """
  return jnp.asarray(leaf) if isinstance(leaf, Tracer) else leaf


def _specs(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of leaves."""
  return {path: _spec(leaf) for path, leaf in leaves.items()}


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype of an array, a number, or an object of any kind.

  Modules may have functions, text, dtypes and other modules among their leaves,
  which stay as the base has them.
  """
  has_both = hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')
  # A class such as np.float32 has those of its instances.
  if has_both and not isinstance(leaf, type):
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype)
  is_number = isinstance(leaf, (bool, int, float, complex))
  dtype = jnp.result_type(leaf) if is_number else np.dtype(object)
  return jax.ShapeDtypeStruct((), dtype)
