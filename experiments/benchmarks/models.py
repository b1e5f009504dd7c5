"""Made-up models of a given size, saved by ordinary Orbax."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import orbax.checkpoint as ocp

WIDTH = 1024
VOCABULARY = 32_768
STACKED = {r'params/layers/.*': 0}


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
  """Shapes of a scanned decoder whose bfloat16 weights take about that much."""
  layer = {
    'norm': (WIDTH,),
    'query': (WIDTH, WIDTH),
    'output': (WIDTH, WIDTH),
    'up': (WIDTH, 4 * WIDTH),
    'down': (4 * WIDTH, WIDTH),
  }
  per_layer = 2 * sum(math.prod(shape) for shape in layer.values())
  embedding = 2 * VOCABULARY * WIDTH
  count = max(1, round((gigabytes * 1e9 - embedding) / per_layer))
  leaves = {f'layers/{name}': (count, *s) for name, s in layer.items()}
  return {'embedding': (VOCABULARY, WIDTH), 'final_norm': (WIDTH,), **leaves}


def save_set(
  folder: pathlib.Path, gigabytes: float, experts: int, compress: bool = False
) -> list[pathlib.Path]:
  """Saves a base and its experts in bfloat16, sharded over all devices.

  Args:
    folder: where; sets that are there already are kept.
    gigabytes: size of one model.
    experts: how many.
    compress: whether the arrays are compressed, as Orbax does by default.

  Returns:
    The paths, the base first.
  """
  count = jax.device_count()
  mesh = jax.make_mesh((count,), ('fsdp',), axis_types=(AxisType.Auto,))
  handler = ocp.PyTreeCheckpointHandler(use_compression=compress)
  checkpointer = ocp.Checkpointer(handler)
  paths = []
  for model in range(experts + 1):
    path = folder.absolute() / ('base' if model == 0 else f'expert_{model}')
    paths.append(path)
    if path.exists():
      continue
    tree: dict = {'params': {}, 'step': np.int32(model)}
    for number, (name, shape) in enumerate(shapes(gigabytes).items()):
      values = np.random.default_rng(number).standard_normal(shape, 'float32')
      values *= 0.02
      if model:
        random = np.random.default_rng([number, model])
        values += 0.002 * random.standard_normal(shape, 'float32')
      axis = max(range(len(shape)), key=lambda i: (shape[i] % count == 0, i))
      spec = PartitionSpec(
        *(('fsdp' if i == axis else None) for i in range(len(shape)))
      )
      leaf = jax.device_put(
        values.astype(jax.numpy.bfloat16), NamedSharding(mesh, spec)
      )
      *parents, last = name.split('/')
      node = tree['params']
      for parent in parents:
        node = node.setdefault(parent, {})
      node[last] = leaf
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
  return paths


def make_set(
  folder: pathlib.Path, gigabytes: float, experts: int, compress: bool = False
) -> list[pathlib.Path]:
  """The same from a process of its own, so that each array has eight shards."""
  code = (
    'import json, pathlib, sys; '
    'from experiments.benchmarks.models import save_set; '
    'save_set(pathlib.Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))'
  )
  arguments = map(json.dumps, (gigabytes, experts, compress))
  flags = '--xla_force_host_platform_device_count=8'
  subprocess.run(
    [sys.executable, '-c', code, folder.absolute(), *arguments],
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
  )
  names = ['base', *(f'expert_{model + 1}' for model in range(experts))]
  return [folder.absolute() / name for name in names]
