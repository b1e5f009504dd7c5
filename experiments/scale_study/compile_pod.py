"""Compiles training, scoring, writing and merging for a pod that is not there.

  python -m experiments.scale_study.compile_pod
  python -m experiments.scale_study.compile_pod --topology=v5e:16x16

For models of 1B to 64B parameters, without a single array, it prints how much
memory a device needs: on 512 simulated CPU devices, the mesh of the preset
`pod` twice, or by TPU's own compiler, which needs no TPU, on the TPUs of a
topology, the mesh as often as there are devices for it.

These are the programs of the preset: its batch, its length, its way to
compute. Experts and the multitask model are trained by the first; answers are
scored by the second, or written out by the third. Merging holds the base and
all merges of a subset, which are made of one read, beside the largest kernel.
"""

from concurrent import futures
import itertools
import math
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from experiments.scale_study import (
  examination,
  model,
  packing,
  shapes,
  sharding,
  stored,
  train,
)
from experiments.scale_study.configs.pod import CONFIG
from experiments.scale_study.merge_points import candidates
from experiments.scale_study.model import ModelConfig
from mergekit_jax import tree
from mergekit_jax.forecasting import compiled, described, topology
from mergekit_jax.sharding import make_mesh

_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'TPUs to compile for, as v5p:8x8x8; simulated CPU devices if absent.',
)
_SIZES = flags.DEFINE_multi_enum(
  'size', [*shapes.SIZES], [*shapes.SIZES], 'A size; may be repeated.'
)

# What is asked is how XLA divides the program and what it keeps in memory; how
# well it writes machine code for this CPU is not.
_CPU_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_cpu_use_fusion_emitters': False,
}


def training(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
  """Compiles steps of training on a batch of the preset."""
  steps = 2
  shape = (steps, CONFIG.batch, CONFIG.length)
  place = NamedSharding(mesh, PartitionSpec(None, *sharding.BATCH))
  batch: Any = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for dtype in (jnp.int32, jnp.float32)
  ]
  state = jax.eval_shape(train.initial_state, model.abstract_params(config))
  with jax.set_mesh(mesh):
    lowered = train.train_chunk.lower(
      config,
      _placed(state, mesh),
      np.zeros(steps, np.float32),
      train.Batch(*batch),
    )
  return _compile(lowered, mesh)


def scored(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
  """Compiles what scores texts, each of which is asked about 64 tokens."""
  texts = jax.ShapeDtypeStruct((packing.ROWS, CONFIG.length), jnp.int32)
  places = jax.ShapeDtypeStruct((64 * packing.ROWS,), jnp.int32)
  params = _placed(model.abstract_params(config), mesh)
  with jax.set_mesh(mesh):
    lowered = examination.token_likelihoods.lower(
      config,
      params,
      texts,
      *(places, places, places),
    )
  return _compile(lowered, mesh)


def written(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
  """Compiles what writes an answer of 64 tokens behind each text."""
  texts = jax.ShapeDtypeStruct((packing.ROWS, CONFIG.length), jnp.int32)
  starts = jax.ShapeDtypeStruct((packing.ROWS,), jnp.int32)
  params = _placed(model.abstract_params(config), mesh)
  with jax.set_mesh(mesh):
    lowered = examination.write_greedily.lower(
      config, params, texts, starts, tokens=64
    )
  return _compile(lowered, mesh)


def merging(config: ModelConfig, mesh: Mesh) -> int:
  """Memory that the merges of a subset of all experts need on each device."""
  leaves, _ = tree.flatten({stored.ROOT: model.abstract_params(config)})
  merges = [*itertools.chain(*candidates(CONFIG).values())]
  plan = described.make_plan(
    leaves,
    [merge.rule() for merge in merges],
    len(CONFIG.categories),
    mesh=mesh,
    memory_budget=CONFIG.memory_budget,
    stacked_axes=model.STACKED_AXES,
    partition_rules=sharding.PARTITION_RULES,
  )
  kernels = compiled.compile_kernels(plan)
  of_model = sum(
    math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, place in zip(
      leaves.values(),
      jax.tree.leaves(sharding.shardings(leaves, mesh)),
      strict=True,
    )
  )
  largest = max(kernel.device_bytes for kernel in kernels)
  return (1 + len(merges)) * of_model + largest


def device_bytes(program: jax.stages.Compiled) -> int:
  """Memory that a program needs on each device."""
  memory: Any = program.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def _compile(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return lowered.compile(_CPU_OPTIONS if on_cpu else None)


def _mesh() -> Mesh:
  """The preset's mesh, `data` times on the devices that are asked for."""
  jax.config.update('jax_platforms', 'cpu')
  axes = {**(CONFIG.mesh or {}), 'data': 1}
  of_model = math.prod(axes.values())
  if not _TOPOLOGY.value:
    jax.config.update('jax_num_cpu_devices', 2 * of_model)
    return make_mesh({**axes, 'data': 2})
  devices = topology.tpus(_TOPOLOGY.value)
  if len(devices) < of_model:
    raise ValueError(
      f'--topology={_TOPOLOGY.value} has {len(devices)} devices, but the '
      f"preset's mesh needs {of_model}. Give a larger one."
    )
  return make_mesh({**axes, 'data': len(devices) // of_model}, devices)


def _placed(tree: Any, mesh: Mesh) -> Any:
  return jax.tree.map(
    lambda spec, place: jax.ShapeDtypeStruct(
      spec.shape, spec.dtype, sharding=place
    ),
    tree,
    sharding.shardings(tree, mesh),
  )


def main(argv: list[str]) -> None:
  """Prints a line for each size that is asked for."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}.')
  try:
    mesh = _mesh()
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  axes = ', '.join(f'{name}={size}' for name, size in mesh.shape.items())
  print(
    f'{CONFIG.batch} texts of {CONFIG.length} tokens on '
    f'{_TOPOLOGY.value or "simulated CPU devices"}, {axes}; GB on each device:'
  )
  print('size  training  scoring  writing  merging')

  def line(name: str) -> str:
    config = shapes.computed(shapes.SIZES[name], CONFIG)
    phases = (training, scored, written)
    needed = [device_bytes(phase(config, mesh)) for phase in phases]
    needed.append(merging(config, mesh))
    gigabytes = (count / 1e9 for count in needed)
    return '{:>4}  {:8.2f}  {:7.2f}  {:7.2f}  {:7.2f}'.format(name, *gigabytes)

  with futures.ThreadPoolExecutor(2) as pool:
    for text in pool.map(line, _SIZES.value):
      print(text, flush=True)


if __name__ == '__main__':
  app.run(main)
