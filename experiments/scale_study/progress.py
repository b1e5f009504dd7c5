"""A bar with the time that is left, for everything that takes long.

Where there is no terminal it is a line now and then.
"""

import io
import shutil
import sys
from typing import Any

import jax
from tqdm import tqdm

# Between two lines, where there is no terminal.
_SECONDS = 10
_LINE = (
  '{desc}: {percentage:.0f} % ({n_fmt} of {total_fmt} {unit}s, {remaining} left'
  '{postfix})'
)


class _Lines(io.TextIOBase):
  """Takes a bar and makes lines of it, which a log can hold."""

  _last = ''

  def write(self, text: str) -> int:
    line = text.strip()
    if line and line != self._last:
      print(line, file=sys.stderr, flush=True)
      self._last = line
    return len(text)


def bar(total: int, label: str, unit: str, done: int = 0) -> Any:
  """Begins a bar, to be used as a context; `update()` moves it on.

  Args:
    total: of the steps.
    label: in front of it.
    unit: of a step.
    done: steps that need not be done again.
  """
  watched = sys.stderr.isatty()
  return tqdm(
    total=total,
    initial=done,
    desc=label,
    unit=unit,
    miniters=1,
    mininterval=0.1 if watched else _SECONDS,
    bar_format=None if watched else _LINE,
    disable=jax.process_index() > 0,
    **_place(0),
  )


def line(place: int) -> Any:
  """Begins a line below a bar, to be used as a context; `say` changes it.

  Args:
    place: how far below the bar, from 1.
  """
  return tqdm(bar_format='{desc}', leave=False, **_place(place))


def say(shown: Any, text: str) -> None:
  """Changes a line, whose end is cut off where the terminal is too narrow."""
  text = text[: shown.ncols]
  if text != shown.desc:
    shown.set_description_str(text)


def _place(below: int) -> dict[str, Any]:
  """Returns where tqdm writes: so far below, or line by line in a log."""
  if not sys.stderr.isatty():
    return {'file': _Lines(), 'position': 0}
  # Some terminals have no size. tqdm itself would write nothing to them.
  columns, rows = shutil.get_terminal_size()
  return {'ncols': columns - 1, 'nrows': rows, 'position': below}
