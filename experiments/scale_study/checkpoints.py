"""Ordinary Orbax checkpoints of training states, sharded over all devices."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import orbax.checkpoint as ocp

import mergekit_jax as mk


def fsdp_mesh() -> Mesh:
  """Puts all devices on one axis."""
  return jax.make_mesh(
    (jax.device_count(),),
    ('fsdp',),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def shard(tree: Any, mesh: Mesh) -> Any:
  """Splits matrices along their last axis, replicates what cannot be split."""

  def place(leaf: jax.Array) -> jax.Array:
    splits = leaf.ndim > 1 and leaf.shape[-1] % mesh.size == 0
    axes = (leaf.ndim - 1) * [None] + ['fsdp'] if splits else []
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

  return jax.tree.map(place, tree)


def save(path: Path, tree: Any) -> None:
  """Writes a tree of arrays, in place of what `path` may hold."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree, force=True)


def restore(path: Path, like: Any) -> Any:
  """Reads a checkpoint with the shapes, dtypes and shardings of `like`.

  A CheckpointManager's directory, as training leaves it, gives its newest step.
  """
  layout = mk.open_checkpoint(path).layout
  item = layout.item if layout else ''
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path / item, target)
