"""How the model lies on a mesh: rules over paths, as the merge has them.

The axes are `data` (copies of the model), `fsdp` (which also divides the batch)
and `tensor` (which divides heads and hidden units).
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergekit_jax import sharding, tree

# The first regular expression that matches a whole path decides; what matches
# none is small and lies on every device. Statistics of the optimizer have the
# paths of their parameters and lie as these do.
PARTITION_RULES = {
  r'(.*/)?(embedding|head)/embedding': PartitionSpec('tensor', 'fsdp'),
  r'(.*/)?layers/.*/(query|key|value|gate|up)/kernel': PartitionSpec(
    None, 'fsdp', 'tensor'
  ),
  r'(.*/)?layers/.*/(out|down)/kernel': PartitionSpec(None, 'tensor', 'fsdp'),
}
# Activations: texts are divided over copies and FSDP groups. Between layers the
# positions of a text are divided too, since every layer's input is kept for the
# backward pass (Korthikanti et al., 2022, arXiv 2205.05198).
BATCH = PartitionSpec(('data', 'fsdp'))  # [batch, length]
RESIDUAL = PartitionSpec(('data', 'fsdp'), 'tensor')  # [batch, length, width]
FEATURES = PartitionSpec(('data', 'fsdp'), None, 'tensor')  # [..., hidden]
# A table of embeddings as it is used: rows cannot be looked up in columns that
# lie on the devices among which the texts are divided.
TABLE = PartitionSpec('tensor')  # [vocabulary, width]


def shardings(params: Any, mesh: Mesh) -> Any:
  """The sharding of every leaf by `PARTITION_RULES`.

  A dimension that its mesh axis does not divide is left whole.

  Args:
    params: a tree of arrays or specs that holds a model at any depth.
    mesh: with the axes of the rules, of any size.

  Returns:
    The same tree with a NamedSharding at each leaf.

  Raises:
    ValueError: if the mesh lacks an axis of the rules.
  """
  leaves, structure = tree.flatten(params)
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  specs = sharding.partitions(PARTITION_RULES, shapes, mesh)
  return structure.unflatten(
    NamedSharding(
      mesh, _dividing(specs.get(path, PartitionSpec()), shape, mesh)
    )
    for path, shape in shapes.items()
  )


def place(params: Any, mesh: Mesh) -> Any:
  """Moves a tree to where `shardings` says."""
  return jax.device_put(params, shardings(params, mesh))


def place_batches(batches: Any, mesh: Mesh) -> Any:
  """Divides arrays [steps, batch, length] over copies and FSDP groups."""
  return jax.device_put(
    batches, NamedSharding(mesh, PartitionSpec(None, *BATCH))
  )


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """Fixes where `x` lies on the mesh of `jax.set_mesh`, if one is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def constrain_by_rules(params: Any) -> Any:
  """Fixes where the leaves of a tree lie, likewise."""
  mesh: Any = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return params
  return jax.lax.with_sharding_constraint(params, shardings(params, mesh))


def _dividing(
  spec: PartitionSpec, shape: Sequence[int], mesh: Mesh
) -> PartitionSpec:
  parts = sharding.shards(spec, len(shape), mesh)
  names = sharding.padded(spec, len(shape))
  return PartitionSpec(
    *(
      name if size % part == 0 else None
      for name, size, part in zip(names, shape, parts, strict=True)
    )
  )
