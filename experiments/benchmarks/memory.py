"""Peak memory of a streamed merge against the size of the model.

    python -m experiments.benchmarks.memory --gigabytes 0.25 1.3

Every method merges a base and 4 experts by the command line, and compiles its
programs itself. The figure is the most *anonymous* memory that the process ever
held, imports, runtime and compiled programs included.
"""

from __future__ import annotations

import pathlib
import tempfile

from experiments.benchmarks import measuring, merges
from experiments.benchmarks.models import make_set


def main() -> None:
  """Measures the most memory that a merge by each method takes."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--gigabytes', nargs='+', type=float, default=[0.25, 1.3])
  parser.add_argument('--experts', type=int, default=4)
  parser.add_argument('--memory_budget', default='512MiB')
  parser.add_argument('--compress', action='store_true')
  arguments = parser.parse_args()
  rows = []
  for size in arguments.gigabytes:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
      folder = pathlib.Path(temporary)
      models = make_set(folder, size, arguments.experts, arguments.compress)
      for name, method in merges.METHODS.items():
        figures = merges.merge(
          method,
          models,
          folder / 'merged',
          folder / f'cache {name}',
          [*merges.LAYERED, f'--memory_budget={arguments.memory_budget}'],
        )
        row = {
          'gigabytes': size,
          'method': name,
          'gigabytes_read': figures['bytes_read'] / 1e9,
          'merge_seconds': round(figures['merge_seconds'], 2),
          'peak_mib': round(figures['peak_mib']),
        }
        print(row, flush=True)
        rows.append(row)
  measuring.publish('memory', rows, arguments.json)


if __name__ == '__main__':
  main()
