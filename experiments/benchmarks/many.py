"""Many merges of the same models from one read, beside each by itself.

    python -m experiments.benchmarks.many

A sweep as one `mergekit-jax merge`, and the same merges as one command each, as
a user starts them. Figures are medians over turns, the one after the other in
each, after a first turn that compiles; those of single commands are added up.

    merges            how many outputs are written
    together_seconds  the one command
    apart_seconds     all commands of one merge
    times_faster      of these two
    together_gb       read by the one command
    apart_gb          read by all commands of one merge
    together_cpu_seconds, apart_cpu_seconds, together_peak_mib, apart_peak_mib
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
import tempfile
from typing import Any

from experiments.benchmarks import measuring, merges
from experiments.benchmarks.models import make_set

SCALES = ('0.2', '0.3', '0.5', '0.8')
METHODS = ('average', 'task_arithmetic', 'ties', 'dare_ties')
# What the one command is told, and what each of the others.
SWEEPS = {
  'task_arithmetic, 4 scales': (
    ['--method=task_arithmetic', f'--sweep=scale={",".join(SCALES)}'],
    [['--method=task_arithmetic', f'--set=scale={x}'] for x in SCALES],
  ),
  'ties model, 4 scales': (
    ['--method=ties', '--set=scope=model', f'--sweep=scale={",".join(SCALES)}'],
    [
      ['--method=ties', '--set=scope=model', f'--set=scale={x}'] for x in SCALES
    ],
  ),
  'four methods': (
    ['--method', *METHODS],
    [[f'--method={x}'] for x in METHODS],
  ),
}


def measure(
  name: str,
  models: Sequence[pathlib.Path],
  folder: pathlib.Path,
  repeats: int,
) -> dict[str, Any]:
  """A row: one sweep.

  Args:
    name: of the sweep.
    models: the base and its experts.
    folder: where to write.
    repeats: how often after a first turn; the row has medians.
  """
  sweep, singles = SWEEPS[name]
  turns = [
    {
      **_costs('together', [sweep], models, folder),
      **_costs('apart', singles, models, folder),
    }
    for _ in range(1 + repeats)
  ]
  figures = measuring.medians(turns[1:])
  faster = figures['apart_seconds'] / figures['together_seconds']
  return {
    'sweep': name,
    'merges': len(singles),
    'times_faster': faster,
    **figures,
  }


def _costs(
  name: str,
  commands: Sequence[Sequence[str]],
  models: Sequence[pathlib.Path],
  folder: pathlib.Path,
) -> dict[str, float]:
  costs = [
    merges.merge(
      merges.Method(tuple(flags)),
      models,
      folder / 'merged',
      folder / 'cache',
      merges.LAYERED,
    )
    for flags in commands
  ]
  merges.clear(folder / 'merged')
  return {
    f'{name}_seconds': sum(cost['command_seconds'] for cost in costs),
    f'{name}_gb': sum(cost['bytes_read'] for cost in costs) / 1e9,
    f'{name}_cpu_seconds': sum(cost['cpu_seconds'] for cost in costs),
    f'{name}_peak_mib': max(cost['peak_mib'] for cost in costs),
  }


def main() -> None:
  """Measures sweeps as one command and as many."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--gigabytes', type=float, default=0.5)
  parser.add_argument('--experts', type=int, default=4)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--sweeps', nargs='+', default=list(SWEEPS))
  arguments = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
    folder = pathlib.Path(temporary)
    models = make_set(folder, arguments.gigabytes, arguments.experts)
    for name in arguments.sweeps:
      rows.append(measure(name, models, folder, arguments.repeats))
      print(rows[-1], flush=True)
  measuring.publish('many', rows, arguments.json)


if __name__ == '__main__':
  main()
