"""Models as Orbax checkpoints: reading their parameters, knowing them again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
import orbax.checkpoint as ocp

from experiments.scale_study import huggingface, shapes, sharding, smollm2
from experiments.scale_study.model import abstract_params, ModelConfig, Params
from experiments.scale_study.study_config import Stored
import mergekit_jax as mk
from mergekit_jax import tree

ROOT = 'params'


def load(path: Path, shape: ModelConfig, mesh: Mesh | None = None) -> Params:
  """Reads the parameters of a model, whatever is stored beside them.

  Args:
    path: of a checkpoint with the parameters under `params`.
    shape: of the model.
    mesh: with the axes of `sharding.PARTITION_RULES`; None takes one device.

  Raises:
    ValueError: if the checkpoint does not hold a model of this shape.
  """
  checkpoint = mk.open_checkpoint(path)
  specs, structure = tree.flatten(abstract_params(shape))
  found = {
    name.removeprefix(f'{ROOT}/'): spec
    for name, spec in checkpoint.specs.items()
    if name.startswith(f'{ROOT}/')
  }
  problems = tree.differences('the checkpoint', specs, found)
  if problems:
    raise ValueError(
      f'{path} does not hold a model of the shape {shape}:\n  '
      + '\n  '.join(problems)
    )
  if mesh is None:
    one = SingleDeviceSharding(jax.local_devices()[0])
    places = dict.fromkeys(specs, one)
  else:
    places, _ = tree.flatten(sharding.shardings(abstract_params(shape), mesh))
  return structure.unflatten(
    checkpoint.read(f'{ROOT}/{name}', places[name]) for name in specs
  )


def save(path: Path, params: Params) -> None:
  """Writes the parameters of a model as an ordinary Orbax checkpoint."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {ROOT: params})


def stored_shape(size: Stored) -> ModelConfig:
  """Returns the shape of a model that there is already.

  Raises:
    ValueError: if it is not known, or not supported.
  """
  if size.shape in shapes.SIZES:
    return shapes.SIZES[size.shape]
  if size.shape and not (Path(size.shape) / 'config.json').exists():
    raise ValueError(
      f'shape={size.shape!r} is no folder with a config.json and none of '
      f'{[*shapes.SIZES]}.'
    )
  return huggingface.read_config(
    folder(size.shape or size.pretrained or size.instruction_tuned)
  )


def original(source: str, size: Stored, mesh: Mesh | None) -> Params:
  """Reads a model that there is already, to be copied into a study."""
  if size.shape is not None:
    return load(Path(source), stored_shape(size), mesh)
  return huggingface.load(folder(source), mesh=mesh)[1]


def folder(source: str) -> Path:
  """Where a model lies that a preset names."""
  return smollm2.folder() if source == smollm2.NAME else Path(source)


def files(path: Path) -> str:
  """Digests names, sizes and times of a model's files; reads no weights."""
  return mk.open_checkpoint(path).fingerprint()


def fingerprint(params: Params) -> str:
  """Digests all bits of the parameters: 16 hexadecimal digits."""
  sums, _ = tree.flatten(_sums(params))
  plain = json.dumps({name: int(total) for name, total in sums.items()})
  return hashlib.blake2b(plain.encode(), digest_size=8).hexdigest()


@jax.jit
def _sums(params: Params) -> Any:
  """Weighted sum of the bits of each leaf: exact, however devices add."""

  def total(leaf: jax.Array) -> jax.Array:
    bits = leaf.view(f'uint{8 * leaf.dtype.itemsize}').astype(jnp.uint32)
    # Odd weights, so that two values of a row that change places are noticed.
    # Whole rows or layers that do are not; other weights would change every
    # fingerprint that results hold.
    weights = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)
    return jnp.sum(bits * (2 * weights + 1), dtype=jnp.uint32)

  return jax.tree.map(total, params)
