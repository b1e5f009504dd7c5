"""Small seeded models: a base and experts, as trees and flat dictionaries."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

# Below the root `params`: names as the masks have them.
FULL = {
  'dense/kernel': (16, 24),
  'odd': (7, 5),
  'one': (1,),
  'scalar': (),
  'empty': (0, 3),
}
# One leaf that the meshes divide and one that no mesh divides.
SMALL = {'dense/kernel': (16, 24), 'odd': (7, 5)}
# Layers along axis 0.
STACKED = {'layers/kernel': (4, 16, 8), 'odd': (7, 5)}


def nest(flat):
  """{'a/b': leaf} -> {'params': {'a': {'b': leaf}, ...}} with an int leaf."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return {'params': tree | {'steps': jnp.arange(3, dtype=jnp.int32)}}


def unnest(tree):
  """The floating-point leaves of `nest`, by name, as numpy arrays."""
  result = {}

  def visit(node, name):
    if isinstance(node, dict):
      for child, value in node.items():
        visit(value, f'{name}/{child}' if name else child)
    elif jnp.issubdtype(node.dtype, jnp.floating):
      result[name] = np.asarray(node)

  visit(tree['params'], '')
  return result


def _flat(shapes, dtype, experts, seed):
  random = np.random.default_rng(seed)
  base = {
    # Away from zero: rounding errors are then those of the base's magnitude.
    name: random.uniform(0.5, 2, shape) * random.choice([-1, 1], shape)
    for name, shape in shapes.items()
  }

  def expert():
    # A fifth of the entries is not touched by fine-tuning.
    return {
      name: value
      + 0.05
      * random.normal(size=value.shape)
      * (random.random(value.shape) > 0.2)
      for name, value in base.items()
    }

  cast = lambda model: {
    name: jnp.asarray(value, dtype) for name, value in model.items()
  }
  return cast(base), [cast(expert()) for _ in range(experts)]


@functools.cache
def _cached(shapes, dtype, experts, seed):
  return _flat(dict(shapes), dtype, experts, seed)


def flat(shapes, dtype='float32', experts=3, seed=0):
  """(base, experts) as {name: array}."""
  return _cached(tuple(shapes.items()), dtype, experts, seed)


def trees(shapes, dtype='float32', experts=3, seed=0):
  """(base, experts) as nested trees."""
  base, others = flat(shapes, dtype, experts, seed)
  return nest(base), [nest(other) for other in others]


MESHES = {
  'fsdp': ((8, 1), ('fsdp', 'tensor')),
  'tensor': ((1, 8), ('fsdp', 'tensor')),
  '2d': ((4, 2), ('fsdp', 'tensor')),
}


def mesh(name, axis_type=AxisType.Auto):
  shape, axes = MESHES[name]
  return jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))


def sharding(mesh, shape):
  """Last axis over `tensor`, the one before over `fsdp`, where they divide."""
  names = ('fsdp', 'tensor')[-len(shape) :] if shape else ()
  spec = [None] * (len(shape) - len(names))
  for size, name in zip(shape[len(spec) :], names, strict=True):
    divides = mesh.shape[name] > 1 and size % mesh.shape[name] == 0
    spec.append(name if divides else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def place(tree, mesh):
  return jax.tree.map(
    lambda leaf: jax.device_put(leaf, sharding(mesh, leaf.shape)), tree
  )


@functools.cache
def _coarse(shapes, experts, seed):
  random = np.random.default_rng(seed)
  base = {
    name: np.asarray(random.integers(64, 128, shape) / 64, np.float32)
    for name, shape in shapes
  }
  return base, [
    {
      name: np.asarray(
        value + random.integers(-4, 5, value.shape) / 64, np.float32
      )
      for name, value in base.items()
    }
    for _ in range(experts)
  ]


def coarse(shapes, experts=3, seed=0):
  """Task vectors of nine values: ties at every cut, masses of exactly 0."""
  return _coarse(tuple(shapes.items()), experts, seed)
