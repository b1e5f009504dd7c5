"""CPU seconds of planning a merge of 100,000 tensors.

    python -m experiments.benchmarks.planning

A base and two experts are merged by TIES over the model, on a mesh of eight
devices. Of described models the plan is made and described: tensors that are
all alike, no two alike, and no two alike of which most are cut into boxes. The
last case is the whole command, `mergekit-jax plan`, on files of tiny tensors.
Planning is the work of one thread, so its CPU seconds are those of one core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from experiments.benchmarks import measuring
import mergekit_jax as mk
from mergekit_jax import sharding
from mergekit_jax.forecasting import described, forecast

_DEVICES = 8
_EXPERTS = 2
# The shape of a tensor by its number. The last ones hold 2 to 200 MB.
SHAPES: dict[str, Callable[[int], tuple[int, int]]] = {
  'alike': lambda i: (1024, 512),
  'unlike': lambda i: (1024 + i // 1000, 512 + i % 1000),
  'unlike, large': lambda i: (1024, 512 + i),
}


def specs(
  count: int, shape: Callable[[int], tuple[int, int]]
) -> dict[str, jax.ShapeDtypeStruct]:
  """So many bfloat16 tensors, by path."""
  return {
    f'layers_{i}/kernel': jax.ShapeDtypeStruct(shape(i), 'bfloat16')
    for i in range(count)
  }


def plan(leaves: dict[str, jax.ShapeDtypeStruct]) -> str:
  """Plans their merge, and describes it."""
  mesh = sharding.make_mesh({'fsdp': _DEVICES})
  made = described.make_plan(leaves, [mk.ties()], _EXPERTS, mesh=mesh)
  return forecast.describe(made)


def save(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
  """Saves a base and experts of so many tensors of four numbers each."""
  files = []
  for model in range(1 + _EXPERTS):
    value = np.full((2, 2), model, 'float32')
    files.append(folder / f'{model}.safetensors')
    save_file({f'layers_{i}.weight': value for i in range(count)}, files[-1])
  return files


def plan_files(files: Sequence[pathlib.Path]) -> measuring.Cost:
  """Plans their merge by the command line."""
  base, *experts = map(str, files)
  return measuring.run(
    [
      *(sys.executable, '-m', 'mergekit_jax', 'plan', '--method', 'ties'),
      *('--base', base, '--experts', *experts, f'--devices={_DEVICES}'),
    ]
  )


def cpu_seconds(work: Callable[[], object]) -> float:
  """What this process takes for it, on all its threads."""
  start = time.process_time()
  work()
  return time.process_time() - start


def measure(
  count: int, repeats: int, folder: str | None = None
) -> list[dict[str, Any]]:
  """A row for each case, of medians.

  Args:
    count: how many tensors a model has.
    repeats: how often all cases are measured, in turns.
    folder: where files are made.
  """
  plan(specs(1, SHAPES['alike']))  # what is traced once
  turns = []
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    files = save(pathlib.Path(temporary), count)
    for _ in range(repeats):
      turn = {}
      for case, shape in SHAPES.items():
        leaves = specs(count, shape)
        turn[case] = cpu_seconds(functools.partial(plan, leaves))
      turn['files'] = plan_files(files).cpu_seconds
      print(turn, flush=True)
      turns.append(turn)
  return [
    {'case': case, 'tensors': count, 'cpu_seconds': seconds}
    for case, seconds in measuring.medians(turns).items()
  ]


def main() -> None:
  """Measures the planning of tensors alike, unlike, and in files."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--tensors', type=int, default=100_000)
  parser.add_argument('--repeats', type=int, default=3)
  arguments = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', _DEVICES)
  rows = measure(arguments.tensors, arguments.repeats, arguments.folder)
  measuring.publish('planning', rows, arguments.json)


if __name__ == '__main__':
  main()
