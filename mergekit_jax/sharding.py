"""Meshes and shardings: Auto axes, which dimension lies on which axis."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import math
from typing import Any, cast

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)
import numpy as np

from mergekit_jax import tree


def auto_mesh(mesh: Mesh) -> Mesh:
  """The same mesh with Auto axes, under which XLA places the computation.

  Raises:
    ValueError: if it is no mesh.
  """
  if not isinstance(mesh, Mesh):
    raise ValueError(
      f'mesh={mesh!r} was given; give a jax.sharding.Mesh, such as '
      "jax.make_mesh((8,), ('fsdp',))."
    )
  kinds = (AxisType.Auto,) * len(mesh.axis_names)
  return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def demand_all_processes(mesh: Mesh) -> None:
  """Raises ValueError unless all processes can take part.

  Each must hold a device of the mesh, and all as many devices, since else JAX
  cannot exchange anything between them.
  """
  counts = collections.Counter(x.process_index for x in jax.devices())
  if len({*counts.values()}) > 1:
    raise ValueError(
      'The processes have '
      f'{", ".join(str(counts[process]) for process in sorted(counts))} '
      'devices; start each with as many, on CPUs by --devices.'
    )
  holders = {device.process_index for device in mesh.devices.flat}
  if idle := sorted(set(range(jax.process_count())) - holders):
    raise ValueError(
      f'The mesh {dict(mesh.shape)} has no device of process '
      f'{", ".join(map(str, idle))}. Give one on which every process has '
      'devices, or start fewer processes.'
    )


def with_auto_axes(
  function: Callable[..., dict[str, jax.Array]],
  like: Mapping[str, jax.Array],
  *arguments: Any,
) -> dict[str, jax.Array]:
  """Calls a function with the arrays' mesh axes made Auto, and back again.

  `jax.make_mesh` makes Explicit axes, on which a scatter needs an annotation of
  its own. Nothing is copied: both shardings place the same shards.

  Args:
    function: takes trees of arrays, returns arrays by path.
    like: arrays by path whose shardings the results take.
    *arguments: trees of arrays and Python numbers.

  Returns:
    What the function returned, sharded as `like`.
  """
  leaves = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
  # Under jit what is computed of constants is traced too, and has no placement.
  if any(isinstance(leaf, Tracer) for leaf in [jnp.zeros(()), *leaves]):
    explicit = [leaf for leaf in leaves if _has_explicit_axes(leaf)]
    if not explicit:
      return function(*arguments)
    # What was not placed is on every device of the mesh of the others.
    mesh = jax.typeof(explicit[0]).sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = {
      path: jax.typeof(leaf).sharding
      if _has_explicit_axes(leaf)
      else everywhere
      for path, leaf in like.items()
    }
    # Not those over which the caller's shard_map goes.
    axes = [
      name
      for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if kind == AxisType.Explicit
    ]
    on_auto_axes = jax.sharding.auto_axes(
      function, axes=tuple(axes), out_sharding=shardings
    )
    return cast(dict[str, jax.Array], on_auto_axes(*arguments))
  with auto_context():
    results = function(*jax.tree.map(_on_auto_axes, arguments))
  return {path: _placed(result, like[path]) for path, result in results.items()}


def _placed(leaf: jax.Array, like: jax.Array) -> jax.Array:
  """The array where the other lies, unless that is wherever JAX put it."""
  if not like.committed or leaf.sharding == like.sharding:
    return leaf
  return jax.device_put(leaf, like.sharding)


def auto_context() -> contextlib.AbstractContextManager[Any]:
  """A context in which the axes of the caller's `jax.set_mesh` are Auto."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return contextlib.nullcontext()
  auto = mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))
  return jax.sharding.use_abstract_mesh(auto)


def _has_explicit_axes(leaf: jax.Array) -> bool:
  sharding = jax.typeof(leaf).sharding
  return AxisType.Explicit in sharding.mesh.axis_types


def _on_auto_axes(leaf: Any) -> Any:
  if not isinstance(leaf, jax.Array) or not _has_explicit_axes(leaf):
    return leaf
  sharding = cast(NamedSharding, leaf.sharding)
  mesh = auto_mesh(cast(Mesh, sharding.mesh))
  # JAX may give a random key the spec of its words, which have an axis more.
  spec = PartitionSpec(*sharding.spec[: leaf.ndim])
  return jax.device_put(leaf, NamedSharding(mesh, spec))


def host_device() -> Any:
  """The host as a device of JAX, whose 64-bit numbers are native.

  Raises:
    ValueError: if JAX was told to do without it.
  """
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError as error:
    platforms = jax.config.values['jax_platforms']
    raise ValueError(
      f'JAX_PLATFORMS={platforms} leaves out the CPU, on which what a method '
      f'asks of the whole scope is answered. Add it: {platforms},cpu.'
    ) from error


def make_mesh(
  axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh with Auto axes.

  Args:
    axes: {name: size}; None puts all devices on one axis, 'fsdp'.
    devices: JAX's own if None.

  Raises:
    ValueError: if an axis has no device, or the mesh has more than there are.
  """
  devices = jax.devices() if devices is None else devices
  axes = dict(axes or {'fsdp': len(devices)})
  size = math.prod(axes.values())
  described = ','.join(f'{name}={count}' for name, count in axes.items())
  if min(axes.values()) < 1:
    raise ValueError(
      f'The mesh {described} has an axis without devices. Give each at least 1.'
    )
  if size > len(devices):
    raise ValueError(
      f'The mesh {described} needs {size} devices, but there are '
      f'{len(devices)}. Give a smaller mesh, or start on more devices: on a '
      f'CPU --devices {size}, or jax_num_cpu_devices. To plan for a mesh that '
      'is not there, give --hosts, or a --topology that is large enough.'
    )
  grid = np.asarray(devices[:size]).reshape(tuple(axes.values()))
  return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def partition(
  shape: Sequence[int], mesh: Mesh, stacked: Sequence[int], smallest: int
) -> PartitionSpec:
  """Lays each mesh axis, largest first, on the first dimension it divides.

  What a device holds is then a run of bytes where the tensor is stored. Where
  the axis divides no dimension, it lies on the largest. Stacked dimensions are
  never sharded, nor is anything into parts of fewer than `smallest` elements.

  Args:
    shape: shape of the tensor.
    mesh: the mesh.
    stacked: axes that are not to be sharded.
    smallest: elements of the smallest part worth a device.

  Returns:
    A partition spec for all dimensions.
  """
  rest = [1 if i in stacked else size for i, size in enumerate(shape)]
  axes: list[tuple[str, ...]] = [()] * len(shape)
  elements = math.prod(shape)
  for name, size in sorted(mesh.shape.items(), key=lambda item: -item[1]):
    dimensions = [i for i in range(len(shape)) if rest[i] >= size]
    if size == 1 or not dimensions or elements // size < smallest:
      continue
    divided = [i for i in dimensions if rest[i] % size == 0]
    chosen = min(divided) if divided else max(dimensions, key=rest.__getitem__)
    axes[chosen] = (*axes[chosen], name)
    rest[chosen] //= size
    elements //= size
  return PartitionSpec(*(names or None for names in axes))


def partitions(
  rules: Mapping[str, PartitionSpec] | None,
  shapes: Mapping[str, Sequence[int]],
  mesh: Mesh,
) -> dict[str, PartitionSpec]:
  """The partition specs that rules give, checked.

  Raises:
    ValueError: if a rule matches nothing, is no partition spec, has more
      entries than a leaf has dimensions, or names an axis that the mesh lacks.
  """
  specs = tree.first_match(rules, shapes, 'partition_rules')
  for path, spec in specs.items():
    if not _fits(spec, len(shapes[path]), mesh):
      raise ValueError(
        f'partition_rules: {spec!r} does not fit {path} of shape '
        f'{tuple(shapes[path])} on a mesh with axes {tuple(mesh.shape)}. Give '
        'a PartitionSpec of at most one entry a dimension: None, an axis or a '
        'tuple of axes, each axis once.'
      )
  # As tuples and lists are, too.
  return {path: PartitionSpec(*spec) for path, spec in specs.items()}


def _fits(spec: Any, rank: int, mesh: Mesh) -> bool:
  """Whether a spec is one, for a leaf of this rank on a mesh."""
  if not isinstance(spec, (PartitionSpec, tuple, list)) or len(spec) > rank:
    return False
  if not all(isinstance(entry, (str, tuple, type(None))) for entry in spec):
    return False
  names = [name for entry in spec for name in _names(entry)]
  axes = [*mesh.shape]
  return all(name in axes and names.count(name) == 1 for name in names)


def padded(spec: PartitionSpec, rank: int) -> list[Any]:
  """The entries of a spec, one a dimension."""
  return [*spec, *[None] * (rank - len(spec))]


def shards(spec: PartitionSpec, rank: int, mesh: Mesh) -> list[int]:
  """Over how many devices each dimension is spread."""
  return [
    math.prod(mesh.shape[name] for name in _names(entry))
    for entry in padded(spec, rank)
  ]


def spread_along(spec: PartitionSpec, kept: Sequence[bool]) -> PartitionSpec:
  """The spec, spread only along the dimensions that are kept."""
  entries = zip(padded(spec, len(kept)), kept, strict=True)
  return PartitionSpec(*(entry if keep else None for entry, keep in entries))


def _names(entry: Any) -> Iterable[str]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else entry
