"""Every method against the time that its bytes take to move, and no more.

    python -m experiments.benchmarks.floor --gigabytes 1

The floor reads the data files of the same models with `pread` into one reused
aligned buffer a thread, as often as the method must read them, writes as many
bytes as the output has with `pwrite`, and syncs them to disk: no Orbax, no
TensorStore, no arithmetic, as many threads as cores. Floors and merges take
turns, the sources lie in the page cache, and every figure is a median.

    merge_seconds     the merge alone, its programs in the compilation cache
    compile_seconds   of these, while programs were traced or loaded
    start_up_seconds  what the command takes beside its merge
    times_floor       merge_seconds to floor_seconds
    cold_seconds      the first command of all, which compiles
"""

from __future__ import annotations

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import mmap
import os
import pathlib
import tempfile
import time
from typing import Any

from experiments.benchmarks import measuring, merges
from experiments.benchmarks.models import make_set

SOURCES = ('uncompressed', 'compressed')
_BLOCK = 2**20  # bytes; a buffer that stays in the cache of its core


@dataclasses.dataclass(frozen=True)
class Moved:
  """How many bytes were read and written, and in which time."""

  bytes: int
  seconds: float


def move(
  files: Sequence[pathlib.Path],
  reads: int,
  output_bytes: int,
  folder: pathlib.Path,
  threads: int | None = None,
) -> Moved:
  """Reads files and writes others, as fast as plain system calls do.

  Args:
    files: what to read.
    reads: how often; the output is written during the last time.
    output_bytes: how much to write.
    folder: a new folder for the output, a file a thread.
    threads: how many; None means one a core.

  Returns:
    The bytes that the system calls say they have moved.
  """
  threads = threads or os.cpu_count() or 1
  folder.mkdir()
  start = time.perf_counter()
  sources = [os.open(file, os.O_RDONLY) for file in files]
  flags = os.O_WRONLY | os.O_CREAT
  sinks = [os.open(folder / str(thread), flags) for thread in range(threads)]
  reading = [
    (os.preadv, source, *block)
    for source in sources
    for block in _blocks(os.fstat(source).st_size)
  ]
  writing = [
    (os.pwritev, sinks[n % threads], n // threads * _BLOCK, size)
    for n, (_, size) in enumerate(_blocks(output_bytes))
  ]
  calls = reading * (reads - 1) + _interleaved(reading, writing)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    shares = [calls[thread::threads] for thread in range(threads)]
    moved = sum(pool.map(_move_blocks, shares))
    list(pool.map(os.fsync, sinks))
  for file in [*sources, *sinks]:
    os.close(file)
  directory = os.open(folder, os.O_RDONLY)
  os.fsync(directory)
  os.close(directory)
  return Moved(moved, time.perf_counter() - start)


def _blocks(size: int) -> list[tuple[int, int]]:
  """Offsets and sizes that make up so many bytes."""
  return [
    (offset, min(_BLOCK, size - offset)) for offset in range(0, size, _BLOCK)
  ]


def _interleaved(*lists: Sequence[Any]) -> list[Any]:
  """The items of all lists, spread evenly over the whole."""
  placed = [(i / len(items), x) for items in lists for i, x in enumerate(items)]
  return [item for _, item in sorted(placed, key=lambda place: place[0])]


def _move_blocks(calls: Sequence[Any]) -> int:
  buffer = memoryview(mmap.mmap(-1, _BLOCK))  # begins at a page
  return sum(
    call(file, [buffer[:size]], offset) for call, file, offset, size in calls
  )


def floor_of(
  method: merges.Method,
  models: Sequence[pathlib.Path],
  output_bytes: int,
  folder: pathlib.Path,
) -> dict[str, float]:
  """The floor of a method; what it writes is deleted again."""
  files = [
    file
    for model in method.sources(models)
    for file in sorted(model.rglob('*'))
    if file.is_file()
  ]
  merges.clear(folder)
  moved = move(files, method.reads, output_bytes, folder)
  merges.clear(folder)
  return {
    'floor_seconds': moved.seconds,
    'floor_gb_per_second': moved.bytes / moved.seconds / 1e9,
  }


def compare(
  name: str, models: Sequence[pathlib.Path], folder: pathlib.Path, repeats: int
) -> dict[str, Any]:
  """A method's floor and its merge, measured in turns.

  Args:
    name: of the method.
    models: a base and its experts.
    folder: where to write.
    repeats: how often each is measured; the figures are medians.
  """
  method = merges.METHODS[name]
  output, cache = folder / 'merged', folder / f'cache {name}'
  merge = lambda: merges.merge(method, models, output, cache, merges.LAYERED)
  cold = merge()
  written = cold['bytes_written']
  figures = measuring.medians(
    [
      {**floor_of(method, models, written, folder / 'floor'), **merge()}
      for _ in range(repeats)
    ]
  )
  return {
    'method': name,
    'gigabytes_read': figures['bytes_read'] / 1e9,
    **{key: figures[key] for key in _SHOWN},
    'times_floor': figures['merge_seconds'] / figures['floor_seconds'],
    'cold_seconds': cold['command_seconds'],
  }


_SHOWN = (
  *('floor_seconds', 'floor_gb_per_second', 'merge_seconds'),
  *('compile_seconds', 'start_up_seconds', 'command_seconds'),
  *('cpu_seconds', 'peak_mib'),
)


def main() -> None:
  """Measures every method beside what its bytes alone take."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--gigabytes', type=float, default=1, help='a model')
  parser.add_argument('--experts', type=int, default=4)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--methods', nargs='+', default=list(merges.METHODS))
  parser.add_argument('--sources', nargs='+', default=SOURCES, choices=SOURCES)
  arguments = parser.parse_args()
  rows = []
  for sources in arguments.sources:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
      folder = pathlib.Path(temporary)
      size, experts = arguments.gigabytes, arguments.experts
      models = make_set(folder, size, experts, sources == 'compressed')
      for name in arguments.methods:
        row = compare(name, models, folder, arguments.repeats)
        rows.append({'sources': sources, **row})
        print(rows[-1], flush=True)
  measuring.publish('floor', rows, arguments.json)


if __name__ == '__main__':
  main()
