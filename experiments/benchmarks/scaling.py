"""Time and memory against model size, experts, devices and processes.

    python -m experiments.benchmarks.scaling

One quantity is varied at a time, around a model of 1 GB, 4 experts and one
process with 2 devices. Every case is a whole command line, run once to compile
and then as often as `--repeats` says; of these turns the medians count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import pathlib
import tempfile
from typing import Any

from experiments.benchmarks import measuring, merges
from experiments.benchmarks.models import make_set


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to run a merge; devices are those of all processes."""

  gigabytes: float
  experts: int = 4
  devices: int = 2
  processes: int = 1


def cases(sizes: Sequence[float], middle: float) -> Iterator[Case]:
  """All cases, those of one size together.

  Args:
    sizes: of a model, in gigabytes.
    middle: the one of them at which all else is varied.
  """
  for size in sizes:
    yield Case(size)
    if size == middle:
      yield from (Case(size, experts=count) for count in (2, 8))
      yield from (Case(size, devices=count) for count in (1, 4))
      yield Case(size, processes=2)


def measure(
  case: Case,
  name: str,
  models: Sequence[pathlib.Path],
  folder: pathlib.Path,
  flags: Sequence[str],
  repeats: int,
) -> dict[str, Any]:
  """A row: one case by one method.

  Args:
    case: the case.
    name: of the method.
    models: a base and at least as many experts as the case has.
    folder: where to write.
    flags: more of the command line.
    repeats: how often after a first turn, which compiles and does not count;
      the row has medians.
  """
  devices = f'--devices={case.devices // case.processes}'
  turns = [
    merges.merge(
      merges.METHODS[name],
      models[: 1 + case.experts],
      folder / 'merged',
      folder / 'cache',
      [*merges.LAYERED, *flags, devices],
      case.processes,
    )
    for _ in range(1 + repeats)
  ]
  figures = measuring.medians(turns[1:])
  merges.clear(folder / 'merged')
  return {
    **dataclasses.asdict(case),
    'method': name,
    'gigabytes_read': figures['bytes_read'] / 1e9,
    'merge_seconds': figures['merge_seconds'],
    'gb_per_second': figures['bytes_read'] / figures['merge_seconds'] / 1e9,
    'command_seconds': figures['command_seconds'],
    'cpu_seconds': figures['cpu_seconds'],
    'peak_mib': figures['peak_mib'],
  }


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """By method: what eight experts take, as a multiple of what two take."""
  few = {row['method']: row for row in rows if row['experts'] == 2}
  many = {row['method']: row for row in rows if row['experts'] == 8}
  quantities = ('gigabytes_read', 'merge_seconds', 'peak_mib')
  return {
    name: {
      key: round(many[name][key] / few[name][key], 2) for key in quantities
    }
    for name in few
  }


def main() -> None:
  """Measures merges of other sizes, experts, devices and processes."""
  parser = measuring.parser(__doc__)
  add = parser.add_argument
  add('--gigabytes', nargs='+', type=float, default=[0.1, 0.5, 1, 4])
  add('--middle', type=float, default=1, help='size at which all is varied')
  add('--repeats', type=int, default=3)
  add('--memory_budget', default='512MiB')
  add(
    '--methods',
    nargs='+',
    default=['task_arithmetic', 'ties model', 'dare_ties'],
  )
  arguments = parser.parse_args()
  flags = [f'--memory_budget={arguments.memory_budget}']
  rows = []
  for size in arguments.gigabytes:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
      folder = pathlib.Path(temporary)
      varied = list(cases([size], arguments.middle))
      models = make_set(folder, size, max(case.experts for case in varied))
      for case in varied:
        for name in arguments.methods:
          row = measure(case, name, models, folder, flags, arguments.repeats)
          print(row, flush=True)
          rows.append(row)
  measuring.publish(
    'scaling', rows, arguments.json, eight_experts_to_two=growth(rows)
  )


if __name__ == '__main__':
  main()
