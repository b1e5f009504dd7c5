"""What writing boxes of arrays has in common in every format."""

import abc
import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
from typing import Any

import jax
import numpy as np

from mergekit_jax.checkpoint import source

Write = Callable[
  [str, Sequence[slice] | None, np.ndarray | jax.Array], source.Future
]


class _AbandonedError(Exception):
  """Told to a writer when what is to be written will not come."""


@contextlib.contextmanager
def handed_over(
  write_checkpoint: Callable[[Callable[[Write], None]], None],
) -> Iterator[Write]:
  """Turns a writer that calls back into a context.

  The writer waits in a thread meanwhile, so that those of several checkpoints
  do not lie in each other, and the thread that is here hears Ctrl-C.

  Args:
    write_checkpoint: calls what it is given once, with `write`, and completes
      the checkpoint when that returns.

  Yields:
    `write`. The checkpoint is complete after the body, unless that raises.
  """
  handed: futures.Future[Write] = futures.Future()
  is_written: futures.Future[None] = futures.Future()

  def produce(write: Write) -> None:
    handed.set_result(write)
    is_written.result()

  def run() -> None:
    try:
      write_checkpoint(produce)
    except BaseException as error:
      if not handed.done():
        handed.set_exception(error)
      raise

  with futures.ThreadPoolExecutor(1, 'checkpoint') as pool:
    running = pool.submit(run)
    try:
      yield handed.result()
    except BaseException:
      is_written.set_exception(_AbandonedError())
      raise
    is_written.set_result(None)
    running.result()


class BoxWriter(abc.ABC):
  """Checks and starts writes; knows which of them are under way."""

  def __init__(self, specs: Mapping[str, jax.ShapeDtypeStruct]):
    self._specs = specs
    self._pending: collections.deque[tuple[str, Any]] = collections.deque()

  def __call__(
    self,
    path: str,
    index: Sequence[slice] | None,
    block: np.ndarray | jax.Array,
  ) -> source.Future:
    if path not in self._specs:
      raise ValueError(
        f'{path!r} is not among the {len(self._specs)} arrays to write.'
      )
    spec = self._specs[path]
    box = source.resolve_index(index, spec.shape, path)
    block = np.asarray(block)
    if (block.dtype, block.shape) != (spec.dtype, source.box_shape(box)):
      raise ValueError(
        f'{path}: the block is {block.dtype}{list(block.shape)}, but box'
        f' {index} needs {spec.dtype}{list(source.box_shape(box))}.'
      )
    # A write that failed is raised by the next one, not at the very end.
    while self._pending and self._pending[0][1].done():
      self._wait_for_oldest()
    future = self._start(path, box, block)
    self._pending.append((path, future))
    return future

  @abc.abstractmethod
  def _start(self, path: str, box: source.Index, block: np.ndarray) -> Any:
    """Starts to write a block that fits; gives the future."""

  def finish(self) -> None:
    """Waits for all writes; raises if one failed."""
    while self._pending:
      self._wait_for_oldest()

  def abandon(self) -> None:
    """Waits until nothing is written any more, whatever came of it."""
    while self._pending:
      self._pending.popleft()[1].exception()

  def _wait_for_oldest(self) -> None:
    path, future = self._pending.popleft()
    try:
      future.result()
    except Exception as error:  # TensorStore's are of every class
      raise OSError(f'{path} could not be written: {error}') from error
