"""A bar with the time that is left, for everything that takes long."""

from typing import Any

import jax
from tqdm import tqdm


def bar(total: int, label: str, unit: str, done: int = 0) -> Any:
  """Begins a bar, to be used as a context; `update()` moves it on.

  Args:
    total: of the steps.
    label: in front of it.
    unit: of a step.
    done: steps that need not be done again.
  """
  return tqdm(
    total=total,
    initial=done,
    desc=label,
    unit=unit,
    # None: not where nobody watches.
    disable=None if jax.process_index() == 0 else True,
  )
