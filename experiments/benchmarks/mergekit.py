"""The same merges by mergekit and by this library, through both command lines.

    python -m experiments.benchmarks.mergekit --gigabytes 0.6

Both merge the same Llama-like safetensors models in bfloat16, on all cores and
with their defaults, except for options that give them the same meaning and for
our memory budget, which bounds what a merge takes. Wall and CPU time and memory
are medians over turns taken by both; of the wall time, start-up is also shown
apart. Then every element of both outputs is compared with a float64 reference
(`judging` says how).

mergekit (LGPL-3.0) is no dependency: it is installed in an environment of its
own, once. pip takes the build of torch that it is configured to find; any will
do, and the one for CPUs only is the smallest by far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import judging, llama, measuring, merges
from experiments.benchmarks.judging import (
  DENSITY,
  DROP_RATE,
  OURS,
  SCALE,
  THEIRS,
)

REQUIREMENTS = ('torch==2.13.0', 'mergekit==0.1.5')
BUDGET = '512MiB'

# By our name for it: how mergekit says the same. Its DARE rescales by the ratio
# of norms if it is not told otherwise.
TOLD: dict[str, dict[str, Any]] = {
  'average': {'merge_method': 'linear'},
  'task_arithmetic': {
    'merge_method': 'task_arithmetic',
    'parameters': {'lambda': SCALE},
  },
  'ties tensor': {
    'merge_method': 'ties',
    'parameters': {'density': DENSITY, 'normalize': True},
  },
  'dare_ties': {
    'merge_method': 'dare_ties',
    'parameters': {
      'density': 1 - DROP_RATE,
      'rescale': False,
      'lambda': 1 / (1 - DROP_RATE),
      'normalize': True,
    },
  },
}


def install(environment: pathlib.Path) -> pathlib.Path:
  """Installs mergekit, if it is not there yet; gives its command."""
  command = environment / 'bin' / 'mergekit-yaml'
  if not command.exists():
    print(f'installing {" ".join(REQUIREMENTS)} into {environment}')
    subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
    pip = [environment / 'bin' / 'python', '-m', 'pip', 'install', '--quiet']
    subprocess.run([*pip, *REQUIREMENTS], check=True)
  return command


def configuration(name: str, models: Sequence[pathlib.Path]) -> str:
  """What mergekit reads, as JSON, which is YAML.

  Args:
    name: our name of the method.
    models: the base and its experts.
  """
  base, *experts = map(str, models)
  method = merges.METHODS[name]
  weight = 1.0 if method.needs_base else 1 / len(experts)
  return json.dumps(
    {
      'models': [
        {'model': expert, 'parameters': {'weight': weight}}
        for expert in experts
      ],
      'dtype': 'bfloat16',
      **({'base_model': base} if method.needs_base else {}),
      **TOLD[name],
    },
    indent=1,
  )


def merge_theirs(
  command: pathlib.Path,
  name: str,
  models: Sequence[pathlib.Path],
  output: pathlib.Path,
) -> dict[str, float]:
  """Runs mergekit as a user does, and measures it."""
  merges.clear(output)
  file = output.parent / 'mergekit.yaml'
  file.write_text(configuration(name, models))
  flags = ('--no-copy-tokenizer', '--no-write-model-card')
  cost = measuring.run(
    [str(command), str(file), str(output), *flags], {'HF_HUB_OFFLINE': '1'}
  )
  # What it takes to say what it can do it takes before a merge as well.
  start_up = measuring.run([str(command), '--help'], {})
  return {
    'command_seconds': cost.seconds,
    'start_up_seconds': start_up.seconds,
    'cpu_seconds': cost.cpu_seconds,
    'peak_mib': cost.peak_bytes / 2**20,
  }


def compare(
  name: str,
  models: Sequence[pathlib.Path],
  shapes: Mapping[str, tuple[int, ...]],
  theirs: pathlib.Path,
  folder: pathlib.Path,
  repeats: int,
) -> list[dict[str, Any]]:
  """A row for each of both, measured in turns and then judged.

  Args:
    name: the method.
    models: the base and its experts.
    shapes: of their tensors, by name.
    theirs: mergekit's command.
    folder: where to write.
    repeats: how often each is measured; the rows are medians.
  """
  ours = merges.METHODS[name]
  cache = folder / 'cache'
  runs: dict[str, Callable[[pathlib.Path], dict[str, Any]]] = {
    THEIRS: lambda output: merge_theirs(theirs, name, models, output),
    OURS: lambda output: merges.merge(
      ours, models, output, cache, [f'--memory_budget={BUDGET}']
    ),
  }
  # The first turn fills caches, of compiled programs and of files.
  turns = [
    {tool: run(folder / tool) for tool, run in runs.items()}
    for _ in range(1 + repeats)
  ]
  outputs = {tool: folder / tool for tool in runs}
  judged = judging.compare_with_reference(name, models, outputs, shapes)
  shown = ('command_seconds', 'start_up_seconds', 'cpu_seconds', 'peak_mib')
  rows = []
  for tool in runs:
    figures = measuring.medians([turn[tool] for turn in turns[1:]])
    rows.append(
      {
        'method': name,
        'tool': tool,
        **{key: figures[key] for key in shown},
        'first_seconds': turns[0][tool]['command_seconds'],
        **judged[tool],
      }
    )
    print(rows[-1], flush=True)
    merges.clear(folder / tool)
  return rows


def main() -> None:
  """Measures both command lines, and compares what they wrote."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--gigabytes', type=float, default=0.6, help='a model')
  parser.add_argument('--experts', type=int, default=4)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--methods', nargs='+', default=list(TOLD))
  parser.add_argument(
    '--environment',
    type=pathlib.Path,
    default=pathlib.Path(tempfile.gettempdir()) / 'mergekit-0.1.5',
    help='where mergekit is installed, and kept',
  )
  arguments = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  theirs = install(arguments.environment)
  shapes = llama.shapes(arguments.gigabytes)
  with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
    folder = pathlib.Path(temporary)
    models = llama.save_set(folder, shapes, arguments.experts)
    rows = [
      row
      for name in arguments.methods
      for row in compare(
        name, models, shapes, theirs, folder, arguments.repeats
      )
    ]
  parameters = sum(int(np.prod(shape)) for shape in shapes.values())
  measuring.publish(
    'mergekit',
    rows,
    arguments.json,
    parameters=parameters,
    compared_with=list(REQUIREMENTS),
  )


if __name__ == '__main__':
  main()
