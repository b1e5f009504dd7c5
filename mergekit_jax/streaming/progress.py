"""How far a merge is: a bar on a terminal, lines of log elsewhere."""

from __future__ import annotations

from collections.abc import Container, Iterator
import contextlib
import sys
import time
from typing import Any

from absl import logging
import jax
import tqdm

from mergekit_jax.planning import plan as plans
from mergekit_jax.report import readable


@contextlib.contextmanager
def progress(plan: plans.Plan, done: Container[int]) -> Iterator[Any]:
  """A bar on a terminal, a line of log for every tenth elsewhere.

  Of several processes the first one shows it.

  Yields:
    A function to call with every unit that is done.
  """
  shown = jax.process_index() == 0
  terminal = sys.stderr.isatty()
  total = sum(unit.source_bytes for unit in plan.units(done)) or 1
  read = 0
  with tqdm.tqdm(
    total=total,
    unit='B',
    unit_scale=True,
    desc='merging',
    disable=not (shown and terminal),
  ) as bar:
    start = time.perf_counter()

    def advanced(unit: plans.Unit) -> None:
      nonlocal read
      before, read = read, read + unit.source_bytes
      bar.update(unit.source_bytes)
      if terminal or not shown:
        return
      if 10 * before // total < 10 * read // total:
        rate = read / max(time.perf_counter() - start, 1e-9)
        logging.info(
          'merged %.0f %% (%s of %s, %s/s, %.0f s left)',
          100 * read / total,
          *map(readable, (read, total, rate)),
          (total - read) / rate,
        )

    yield advanced
