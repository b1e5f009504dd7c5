"""Whole merges of models so small that their weights do not matter.

    python -m experiments.benchmarks.start_up

`mergekit-jax merge` of a base and two experts, as a user starts it: programs
are kept where the command line keeps them by itself, below `$XDG_CACHE_HOME`,
which is a new folder in every turn. All figures are medians over turns.

    cold_seconds      the first merge in such a folder, which compiles
    warm_seconds      the next one, which finds the programs there
    cold_cpu_seconds  of all threads
    warm_cpu_seconds
    programs          what the first merge left there
    programs_added    what the next one added
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
import sys
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.benchmarks import llama, measuring, merges

METHODS = ('average', 'dare_ties', 'ties model')
SHAPES = {'embedding': (64, 32), 'kernel': (32, 48), 'norm': (32,)}
EXPERTS = 2


def save_orbax(folder: pathlib.Path) -> list[pathlib.Path]:
  """Saves a base and its experts in bfloat16 by ordinary Orbax."""
  paths = []
  for model in range(1 + EXPERTS):
    random = np.random.default_rng(model)
    tree = {
      name: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
      for name, shape in SHAPES.items()
    }
    paths.append(folder.absolute() / f'model_{model}')
    ocp.PyTreeCheckpointer().save(paths[-1], {'params': tree})
  return paths


def save_safetensors(folder: pathlib.Path) -> list[pathlib.Path]:
  """The same in safetensors."""
  return llama.save_set(folder, SHAPES, EXPERTS)


SOURCES = {'orbax': save_orbax, 'safetensors': save_safetensors}


def turn(
  name: str, models: Sequence[pathlib.Path], folder: pathlib.Path
) -> dict[str, float]:
  """One cold and one warm merge.

  Args:
    name: of the method.
    models: the base and its experts.
    folder: a new one, for the cache and the outputs.
  """
  method = merges.METHODS[name]
  command = [sys.executable, '-m', 'mergekit_jax', 'merge', *method.flags]
  command += ['--experts', *map(str, models[1:])]
  command += ['--base', str(models[0])] if method.needs_base else []
  # Or a cache that the machine has for all of JAX would be used instead.
  places = {'XDG_CACHE_HOME': str(folder), 'JAX_COMPILATION_CACHE_DIR': ''}
  figures = {}
  programs = [0]
  for start in ('cold', 'warm'):
    output = ['--output', str(folder / start)]
    cost = measuring.run([*command, *output], places)
    figures[f'{start}_seconds'] = cost.seconds
    figures[f'{start}_cpu_seconds'] = cost.cpu_seconds
    programs.append(len(list((folder / 'mergekit_jax').glob('*-cache'))))
  _, cold, warm = programs
  return {**figures, 'programs': cold, 'programs_added': warm - cold}


def main() -> None:
  """Measures cold and warm merges of tiny models."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--methods', nargs='+', default=list(METHODS))
  arguments = parser.parse_args()
  rows: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
    folder = pathlib.Path(temporary)
    for sources, save in SOURCES.items():
      models = save(folder / sources)
      for name in arguments.methods:
        turns = [
          turn(name, models, folder / f'{sources} {name} {i}')
          for i in range(arguments.repeats)
        ]
        row = {'sources': sources, 'method': name, **measuring.medians(turns)}
        print(row, flush=True)
        rows.append(row)
  measuring.publish('start_up', rows, arguments.json)


if __name__ == '__main__':
  main()
