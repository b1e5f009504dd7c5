"""The newest state of a phase of training, kept so that it can go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar('T')


class Saved:
  """A CheckpointManager that knows what it is a checkpoint of.

  A state is visible only when it is complete, and replaces the one before.
  """

  def __init__(self, directory: Path, identity: Mapping[str, Any]):
    """Opens or creates a directory.

    Args:
      directory: of the CheckpointManager.
      identity: what determines the training, as JSON has it.
    """
    self._directory = directory
    self._identity = dict(identity)
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=1,
        # On a CPU, saving in the background would read buffers of a state that
        # the next step has already used up.
        enable_async_checkpointing=False,
      ),
    )

  def __enter__(self) -> 'Saved':
    return self

  def __exit__(self, *error: Any) -> None:
    self._manager.close()

  def step(self) -> int | None:
    """Returns the step of the newest state, None if there is none.

    Raises:
      ValueError: if the directory holds the state of another training.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    found = self._manager.metadata(step).custom_metadata
    if not found:
      found = dict.fromkeys(self._identity)
    # What an older version of the study did not note may be anything.
    differing = [
      f'{key} is {found[key]!r} there and {value!r} here'
      for key, value in self._identity.items()
      if found.get(key, value) != value
    ]
    if differing:
      raise ValueError(
        f'{self._directory} holds step {step} of another training: '
        f'{"; ".join(differing)}. Give another directory; or, to start over, '
        'remove this one and, in a study, scores/ and cells/ of its arm, which '
        'are of the model that it holds.'
      )
    return step

  def restore(self, state: T) -> T:
    """The newest state, placed as `state` is; `state` if there is none."""
    step = self.step()
    if step is None:
      return state
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored: Any = self._manager.restore(
      step, args=ocp.args.StandardRestore(like)
    )
    return restored

  def save(self, step: int, state: Any) -> None:
    """Keeps a state, in place of the one before."""
    self._manager.save(
      step,
      args=ocp.args.StandardSave(state),
      custom_metadata=self._identity,
    )
