"""Nanoseconds an element in memory, against what the memory allows.

    python -m experiments.benchmarks.kernels

Every method merges one tree, sharded over a CPU device a core, by a compiled
`mk.merge`. Predicted is the time that the bytes which it must read and write
take at the rate of a copy by numpy, in as many threads, between arrays that
have been used before. The exact k-th magnitude and the making of masks are
measured alone as well.
"""

from __future__ import annotations

from collections.abc import Callable
import concurrent.futures
import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from experiments.benchmarks import measuring
import mergekit_jax as mk

_COLUMNS = 4096
_TENSORS = 4
_DENSITY = 0.2


@mk.rule
class Threshold:
  """The magnitude above which a fraction of a tensor lies, everywhere."""

  density: float

  def __call__(self, t: mk.Place):
    threshold = yield from mk.kth_magnitude(t.experts[0], self.density)
    return threshold


@mk.rule
class Masks:
  """Which experts DARE keeps, as the sum of 2^i over those it keeps."""

  drop_rate: float

  def __call__(self, t: mk.Place):
    dropped = jnp.round(2**16 * self.drop_rate).astype(jnp.uint32)
    kept = [t.random_bits(i) >= dropped for i in range(len(t.experts))]
    return sum(jnp.where(mask, 2.0**i, 0.0) for i, mask in enumerate(kept))


@dataclasses.dataclass(frozen=True)
class Work:
  """Something compiled to be measured.

  Attributes:
    run: does it once and gives arrays.
    elements: of one model.
    bytes: that it must read and write, all in all.
  """

  run: Callable[[], Any]
  elements: int
  bytes: int


def models(count: int, elements: int, mesh: Mesh) -> list[dict[str, Any]]:
  """A base and experts in bfloat16, of about so many elements each."""
  rows = elements // (_COLUMNS * _TENSORS * mesh.size) * mesh.size
  shape = (max(rows, mesh.size), _COLUMNS)
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  random = np.random.default_rng(0)
  bases = [random.standard_normal(shape, 'float32') for _ in range(_TENSORS)]

  def model(spread: float) -> dict[str, Any]:
    return {
      f'tensor_{i}': jax.device_put(
        (base + spread * random.standard_normal(shape, 'float32')).astype(
          jnp.bfloat16
        ),
        sharding,
      )
      for i, base in enumerate(bases)
    }

  return [model(0.0), *(model(0.1) for _ in range(count - 1))]


def all_work(experts: int, elements: int, mesh: Mesh) -> dict[str, Work]:
  """Every method on one tree, and the two parts that some are made of."""
  base, *others = models(experts + 1, elements, mesh)
  size = sum(leaf.size for leaf in base.values())
  merge = jax.jit(mk.merge)
  key = jax.random.key(0)

  def method(rule: Any, reads: int = 1, base: Any = base) -> Work:
    count = len(others) + (base is not None)
    run = lambda: merge(rule, others, base, key=key)
    return Work(run, size, 2 * size * (reads * count + 1))

  first = {
    name: jax.device_put(leaf.astype(jnp.float32), leaf.sharding)
    for name, leaf in others[0].items()
  }
  # One element is looked at, so that the tensor of thresholds is not written.
  threshold = jax.jit(
    lambda rule, tree: [x[0, 0] for x in mk.merge(rule, [tree]).values()]
  )
  masks = jax.jit(lambda rule, trees, key: mk.merge(rule, trees, key=key))
  return {
    'average': method(mk.average(), base=None),
    'task_arithmetic': method(mk.task_arithmetic(0.3)),
    'ties tensor': method(mk.ties(_DENSITY, scope='tensor'), reads=3),
    'ties model': method(mk.ties(_DENSITY, scope='model'), reads=3),
    'dare': method(mk.dare()),
    'dare_ties': method(mk.dare_ties()),
    'k-th magnitude': Work(
      lambda: threshold(Threshold(_DENSITY), first), size, 2 * 4 * size
    ),
    'masks': Work(lambda: masks(Masks(0.9), others, key), size, 2 * size),
  }


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
  """The median time of something that has been run before."""
  jax.block_until_ready(run())
  taken = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    taken.append({'seconds': time.perf_counter() - start})
  return measuring.medians(taken)['seconds']


def copy_bandwidth(size: int, threads: int, repeats: int) -> float:
  """Bytes that a copy reads and writes in a second.

  Args:
    size: of what is copied, in bytes; many times what the caches hold.
    threads: how many copy a part each.
    repeats: how often; the median counts.
  """
  parts = [
    (np.ones(size // threads, np.uint8), np.ones(size // threads, np.uint8))
    for _ in range(threads)
  ]
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    copy = lambda: list(pool.map(lambda part: np.copyto(*part), parts))
    seconds = seconds_of(copy, repeats)
  return 2 * (size // threads * threads) / seconds


def row(
  name: str, work: Work, bandwidth: float, repeats: int
) -> dict[str, Any]:
  """Predicted and measured time of one work."""
  predicted = work.bytes / work.elements / bandwidth * 1e9
  measured = seconds_of(work.run, repeats) / work.elements * 1e9
  return {
    'work': name,
    'bytes_per_element': work.bytes / work.elements,
    'predicted_ns': predicted,
    'measured_ns': measured,
    'ratio': measured / predicted,
  }


def main() -> None:
  """Measures every method in memory beside the copy bandwidth."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--millions', type=float, default=64, help='of elements')
  parser.add_argument('--experts', type=int, default=4)
  parser.add_argument('--repeats', type=int, default=7)
  arguments = parser.parse_args()
  cores = os.cpu_count() or 1
  jax.config.update('jax_num_cpu_devices', cores)
  mesh = jax.make_mesh((cores,), ('fsdp',), axis_types=(AxisType.Auto,))
  bandwidth = copy_bandwidth(2**29, cores, arguments.repeats)
  rows = []
  elements = round(arguments.millions * 1e6)
  for name, work in all_work(arguments.experts, elements, mesh).items():
    rows.append(row(name, work, bandwidth, arguments.repeats))
    print(rows[-1], flush=True)
  measuring.publish(
    'kernels', rows, arguments.json, copy_gb_per_second=bandwidth / 1e9
  )


if __name__ == '__main__':
  main()
