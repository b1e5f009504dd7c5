"""The models of models.py as checkpoints on disk, written by ordinary Orbax."""

import hashlib
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from tests import models

logging.getLogger('absl').setLevel(logging.ERROR)


def save(path, tree, compress=False, metadata=None):
  """A flat save, with a chunk for every shard of the arrays; gives the path."""
  handler = ocp.PyTreeCheckpointHandler(use_compression=compress)
  ocp.Checkpointer(handler).save(
    pathlib.Path(path).absolute(),
    args=ocp.args.PyTreeSave(tree),
    custom_metadata=metadata,
  )
  return path


def save_set(directory, shapes, dtype='float32', experts=3, compress=False):
  """Saves a base and experts of models.py; gives (base, experts) as paths."""
  base, others = models.trees(shapes, dtype, experts)
  paths = [
    save(directory / name, tree, compress)
    for name, tree in [
      ('base', base),
      *((f'expert{i}', other) for i, other in enumerate(others)),
    ]
  ]
  return paths[0], paths[1:]


def save_safetensors(path, tree):
  """One file whose tensors are called by their paths."""
  save_file(
    {name: np.asarray(leaf) for name, leaf in leaves(tree).items()}, path
  )
  return path


def save_shards(directory, arrays):
  """A file an array and their index, with a configuration beside them."""
  directory.mkdir(parents=True)
  places = {}
  for number, name in enumerate(arrays):
    file = f'model-{number + 1:05}-of-{len(arrays):05}.safetensors'
    save_file({name: arrays[name]}, directory / file, {'format': 'pt'})
    places[name] = file
  index = {'metadata': {}, 'weight_map': places}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
  (directory / 'config.json').write_text('{"model_type": "tiny"}')


def load(path):
  """What ordinary Orbax restores: {path: array}."""
  handler = ocp.PyTreeCheckpointHandler()
  restored = ocp.Checkpointer(handler).restore(pathlib.Path(path).absolute())
  return {name: np.asarray(leaf) for name, leaf in leaves(restored).items()}


def load_floats(path):
  """The merged leaves below `params`, by their names in models.py."""
  return {
    name.removeprefix('params/'): leaf
    for name, leaf in load(path).items()
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }


def leaves(tree):
  return {
    jax.tree_util.keystr(keys, simple=True, separator='/'): leaf
    for keys, leaf in jax.tree.leaves_with_path(tree)
  }


def digest(path):
  """What a directory holds: {file: (hash of its bytes, time of change)}."""
  path = pathlib.Path(path)
  files = [path] if path.is_file() else sorted(path.rglob('*'))
  return {
    str(file): (
      hashlib.blake2b(file.read_bytes()).hexdigest() if file.is_file() else '',
      file.stat().st_mtime_ns,
    )
    for file in files
  }


def report_of(output):
  return json.loads((output.parent / f'{output.name}.report.json').read_text())
