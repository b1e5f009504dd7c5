"""Random merges of random checkpoints, by hand: python -m tests.fuzz 600 0

Each draws a small model (ranks, dtypes, stacked layers), stores the base and
the experts in a format of their own, and merges them by one to three methods
within a budget, on some mesh. What is written, what a sweep hands out and what
is merged in memory must be the same bits, and what is written must verify. It
goes on for so many seconds, from the seed that is given; a seed that fails is
printed with all that was drawn, and draws the same again.
"""

from __future__ import annotations

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'

import math  # noqa: E402
import pathlib  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import mergekit_jax as mk  # noqa: E402
from mergekit_jax import sharding, verify  # noqa: E402
from tests import checkpoints, compare, models  # noqa: E402

PATHS = ('a', 'emb', 'layers/w', 'layers/b', 'x.y/z', 'f/g_2/k', 'f/g_10/k')
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 8, 16, 24, 33)
MESHES = ({'x': 1}, {'x': 2}, {'x': 3}, {'x': 8}, {'x': 2, 'y': 2})
DTYPES = ('float32', 'bfloat16', 'float16')


def spec_of(draw, shape, mesh):
  """A spec that divides the shape, or spreads nothing."""
  entries = [None] * len(shape)
  for name, devices in mesh.shape.items():
    axes = [
      i for i, n in enumerate(shape) if not entries[i] and not n % devices
    ]
    if axes and draw.random() < 0.7:
      entries[draw.choice(axes)] = name
  return jax.P(*entries)


def mesh_of(draw):
  sizes = draw.choice(MESHES)
  return sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def shape_of(draw):
  shape = [
    draw.choice(LENGTHS) for _ in range(draw.choice((0, 1, 1, 2, 2, 3, 4)))
  ]
  if 0 < len(shape) < 4 and draw.random() < 0.2:
    shape[draw.randrange(len(shape))] = draw.choice((256, 1000, 4096))
  return tuple(shape)


def method_of(draw, experts):
  weights = [round(draw.uniform(0.1, 2), 2) for _ in range(experts)]
  common = {
    'scale': round(draw.uniform(0.1, 2), 2),
    'weights': draw.choice((None, weights)),
  }
  of_ties = {
    'scope': draw.choice(('model', 'tensor')),
    'election': draw.choice(('mass', 'count')),
    'zero_mass': draw.choice(('positive', 'majority')),
    'combine': draw.choice(('mean', 'sum')),
  }
  rate = draw.choice((0.0, 0.1, 0.5, 0.9))
  density = draw.choice((0.05, 0.2, 0.5, 0.77, 1.0))
  return draw.choice(
    (
      mk.average(common['weights']),
      mk.task_arithmetic(**common),
      mk.ties(density, **common, **of_ties),
      mk.dare(rate, **common),
      mk.dare_ties(rate, draw.choice((None, density)), **common, **of_ties),
    )
  )


def models_of(draw, shapes, experts):
  """A base and experts, some of whose entries are equal or alike."""
  values = np.random.default_rng(draw.randrange(2**32))
  coarse = draw.random() < 0.3
  own = [draw.choice(DTYPES) for _ in shapes]
  others = draw.choice((own, [draw.choice(DTYPES) for _ in shapes]))
  made = []
  for number in range(experts + 1):
    model = {}
    for path, dtype in zip(shapes, others if number else own, strict=True):
      value = values.standard_normal(shapes[path])
      if number:
        value = made[0][path].astype(np.float64) + 0.05 * value
      if coarse:
        value = np.round(value, 1)
      model[path] = np.asarray(value, jax.numpy.dtype(dtype))
    made.append(model)
  return made


def save(draw, path, model):
  """By Orbax, from arrays of a mesh or of numpy, or as safetensors."""
  kind = draw.choice(('numpy', 'mesh', 'mesh', 'safetensors'))
  tree = models.nest(model)
  if kind == 'safetensors':
    path.mkdir()
    checkpoints.save_safetensors(path / 'model.safetensors', tree)
    return
  if kind == 'mesh':
    mesh = mesh_of(draw)
    place = lambda x: jax.NamedSharding(mesh, spec_of(draw, x.shape, mesh))
    tree = jax.tree.map(lambda x: jax.device_put(x, place(x)), tree)
  handler = ocp.PyTreeCheckpointHandler(
    use_compression=draw.random() < 0.5,
    use_ocdbt=draw.random() < 0.7,
    use_zarr3=draw.random() < 0.3,
  )
  ocp.Checkpointer(handler).save(path, args=ocp.args.PyTreeSave(tree))


def arrays_of(tree):
  return {k: np.asarray(v) for k, v in checkpoints.leaves(tree).items()}


def written(path):
  file = path / 'model.safetensors'
  return load_file(file) if file.exists() else checkpoints.load(path)


def within_a_budget(budget, merge):
  """Calls `merge(budget)`, with what it asks for if that is too little."""
  while True:
    try:
      return merge(budget)
    except ValueError as error:
      asked = re.search(r'takes ([\d,]+) bytes. Give at least', str(error))
      if asked is None:
        raise
      least = int(asked[1].replace(',', ''))
      assert least > budget, error
      budget = least


def merge(seed, folder, told):
  """Merges once; `told` gets what was drawn."""
  draw = random.Random(seed)
  experts = draw.choice((1, 2, 2, 3, 4, 5, 9))
  paths = draw.sample(PATHS, draw.randint(1, 5))
  told['shapes'] = shapes = {path: shape_of(draw) for path in paths}
  base, *others = drawn = models_of(draw, shapes, experts)
  told['dtypes'] = [{k: str(v.dtype) for k, v in m.items()} for m in drawn]
  sources = [folder / str(number) for number in range(experts + 1)]
  for path, model in zip(sources, drawn, strict=True):
    save(draw, path, model)
  mesh = mesh_of(draw)
  names = [f'm{i}' for i in range(draw.choice((1, 1, 2, 3)))]
  told['methods'] = {name: method_of(draw, experts) for name in names}
  told['seeds'] = {name: draw.randrange(2**31) for name in names}
  shared = told['shared'] = {
    'stacked_axes': {
      f'params/{path}': draw.randrange(len(shape))
      for path, shape in shapes.items()
      if path.startswith('layers') and len(shape) > 1
    },
    'overrides': {
      f'params/{path}': draw.choice(('base', mk.average(), mk.ties(0.3)))
      for path in paths
      if draw.random() < 0.1
    },
  }
  shared = {name: value or None for name, value in shared.items()}
  streamed = told['streamed'] = {
    'mesh': mesh,
    'partition_rules': {
      f'params/{path}': spec_of(draw, shape, mesh)
      for path, shape in shapes.items()
      if draw.random() < 0.3
    },
  }
  options = {'seed': told['seeds'], **shared, **streamed}
  told['budget'] = budget = draw.choice((10**6, 4 * 10**6, 64 * 10**6))
  told['format'] = format = draw.choice((None, 'orbax', 'safetensors'))
  outputs = {name: folder / name for name in names}
  within_a_budget(
    budget,
    lambda budget: mk.merge_checkpoints(
      told['methods'],
      experts=sources[1:],
      base=sources[0],
      output=outputs,
      memory_budget=budget,
      format=format,
      **options,
    ),
  )
  swept = within_a_budget(
    budget,
    lambda budget: mk.sweep(
      told['methods'],
      sources[1:],
      sources[0],
      arrays_of,
      memory_budget=budget,
      **options,
    ),
  )
  for name, method in told['methods'].items():
    in_memory = mk.merge(
      method,
      [*map(models.nest, others)],
      models.nest(base),
      key=told['seeds'][name],
      **shared,
    )
    expected = arrays_of(in_memory)
    compare.same_bits(swept[name], expected)
    compare.same_bits(written(outputs[name]), expected)
    damages = verify.verify(outputs[name])
    assert not damages, damages


def main(seconds: float, seed: int) -> int:
  """Prints the cases that fail and returns how many did."""
  warnings.simplefilter('ignore')  # of dtypes and norms, which are random
  end = time.monotonic() + seconds
  merged = failed = 0
  while time.monotonic() < end:
    told = {}
    with tempfile.TemporaryDirectory() as folder:
      try:
        merge(seed, pathlib.Path(folder), told)
      except Exception as error:
        failed += 1
        print(f'seed {seed}: {type(error).__name__}: {error}\n  {told}')
    seed, merged = seed + 1, merged + 1
  print(f'{merged} merges, {failed} failed')
  return failed


if __name__ == '__main__':
  sys.exit(main(float(sys.argv[1]), int(sys.argv[2])) > 0)
