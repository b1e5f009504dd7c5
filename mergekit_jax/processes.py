"""What several processes do as one: each calls the same, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import hashlib
import json

from etils import epy
import jax
from jax.experimental import multihost_utils
import numpy as np

with epy.lazy_imports():
  import orbax.checkpoint as ocp

# Bytes of what a process tells the others; each must expect as many.
_LONGEST = 4096


def barrier(name: str) -> None:
  """Waits until all processes have come here."""
  if jax.process_count() > 1:
    ocp.multihost.sync_global_processes(f'mergekit_jax:{name}')


def on_primary(action: Callable[[], object]) -> None:
  """Runs `action` on the first process while the others wait.

  Raises:
    BaseException: what `action` raises, on the first process.
    OSError: if it raises, on the others: they would else go on without what it
      was to do, and wait for the first process where it never comes.
  """
  together(action if jax.process_index() == 0 else lambda: None)


def together(action: Callable[[], object]) -> None:
  """Runs `action` on every process; if one fails, all do.

  Raises:
    BaseException: what `action` raises, on the processes where it does.
    OSError: on the others, with what the first of them said.
  """
  failure = None
  try:
    action()
  except BaseException as error:
    failure = error
  said = '' if failure is None else f'{type(failure).__name__}: {failure}'
  heard = _all_told(said)
  if failure is not None:
    raise failure
  for process, said in enumerate(heard):
    if said:
      raise OSError(
        f'Process {process} failed, so all processes end. It said: {said}'
      )


def demand_agreement(facts: Mapping[str, str]) -> None:
  """Raises on all processes unless all of them give the same facts.

  Processes that were told different things would else each write their part of
  another merge, or wait for each other forever.

  Args:
    facts: by name.

  Raises:
    ValueError: on the processes that differ from the first, with the names.
    OSError: on the others.
  """
  own = {name: _digest(fact) for name, fact in facts.items()}
  if len(json.dumps(own)) > _LONGEST:
    own = {'arguments': _digest(json.dumps(own))}
  first = json.loads(_all_told(json.dumps(own))[0])

  def demand_same() -> None:
    differing = [
      name for name in own | first if own.get(name) != first.get(name)
    ]
    if differing:
      raise ValueError(
        f'Process {jax.process_index()} and process 0 differ in '
        f'{", ".join(differing)}. Give all processes the same arguments and '
        'versions, and see that all find the same sources: a newer step may '
        'have been saved when only some of them had looked; name the step.'
      )

  together(demand_same)


def first_told(said: str) -> str:
  """What the first process says that says anything; '' if none does."""
  return next(filter(None, _all_told(said)), '')


def all_gathered(numbers: Sequence[int]) -> np.ndarray:
  """What each process gave, int64 `[processes, *]`."""
  own = np.asarray(numbers, np.int64)
  # As bytes: not all devices have numbers of 64 bits.
  heard = multihost_utils.process_allgather(own.view(np.uint8))
  return heard.reshape(-1, own.nbytes).view(np.int64)


def _all_told(said: str) -> list[str]:
  """What each process said, cut short where it is long."""
  if jax.process_count() == 1:
    return [said]
  told = said.encode(errors='replace')[:_LONGEST].ljust(_LONGEST, b'\0')
  heard = multihost_utils.process_allgather(np.frombuffer(told, np.uint8))
  return [row.tobytes().rstrip(b'\0').decode(errors='ignore') for row in heard]


def _digest(fact: str) -> str:
  return hashlib.blake2b(fact.encode(), digest_size=8).hexdigest()
