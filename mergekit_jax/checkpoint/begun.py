"""The plan that a stage was begun with, which a resume must agree with."""

from collections.abc import Mapping
import json
import re
from typing import Any

from absl import logging
from etils import epath


def read(file: epath.Path) -> dict[str, Any] | None:
  """The plan of what was begun, if there is one that can be read."""
  if not file.exists():
    return None
  try:
    return json.loads(file.read_text())
  except ValueError:
    logging.warning('%s is damaged; the merge begins anew.', file)
    return None


def demand_same(
  directory: epath.Path, begun: Mapping[str, Any], plan: Mapping[str, Any]
) -> None:
  """Raises ValueError if the plan differs from what was begun in a stage.

  Args:
    directory: the stage.
    begun: what it was begun with.
    plan: what it would be gone on with, as JSON gives it back.
  """
  changed = [
    key for key in {**plan, **begun} if plan.get(key) != begun.get(key)
  ]
  if not changed:
    return
  described = '\n  '.join(
    _described(key, begun.get(key), plan.get(key)) for key in changed
  )
  if any(key.startswith('source ') for key in changed):
    what_to_do = (
      'A source that is the same one as then has changed since, and what was '
      'made of it cannot be finished: resume=False (--noresume) throws away '
      'what was done. If another one was given, give the one of then.'
    )
  else:
    versions = ' and versions' if 'versions' in changed else ''
    what_to_do = (
      f'Give the same arguments{versions} to finish it, or resume=False '
      '(--noresume) to throw it away.'
    )
  raise ValueError(
    f'{directory} holds an unfinished merge that differs:\n  {described}\n'
    f'{what_to_do}'
  )


def _described(key: str, then: Any, now: Any) -> str:
  """What differs: its name alone if it is known by its digest."""
  if all(re.fullmatch('[0-9a-f]{32}', str(value)) for value in (then, now)):
    return key
  return f'{key}: {_short(then)} then, {_short(now)} now'


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 200 else f'{text[:200]}…'
