"""Where the parameters begin in what training programs save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_jax import tree

_ROOTS = ('params/params', 'params', 'target', 'model', 'model_params')
# Below these lies what an optimizer keeps: as large as the parameters, of their
# names and shapes, and nothing to merge.
_OPTIMIZER = {'opt_state', 'opt_states', 'optimizer', 'param_states'}
_TRAINING_STATE = _OPTIMIZER | {
  *('opt', 'state', 'step', 'steps', 'ema', 'ema_params', 'params_ema'),
  *('rng', 'rngs', 'key', 'training_key'),
  *('iterator', 'data', 'metrics', 'loss_scale'),
}


def parameter_root(leaves: Mapping[str, Any]) -> str:
  """Where the parameters begin.

  Args:
    leaves: all leaves (anything with a dtype) by path.

  Returns:
    'params/params', 'params', 'target', 'model' or 'model_params', the first of
    them that leads to a leaf; such a root below the key that a training state
    has to itself, as in 'state/params'; else '', the whole tree. So it is where
    something other than training state lies beside a 'model', which is then one
    module of several.
  """
  keys = [path.split('/') for path in leaves]
  holders = {
    first for first, *rest in keys if _OPTIMIZER.intersection(rest[:1])
  }
  for holder in sorted(holders - _OPTIMIZER):
    state = {
      path.removeprefix(f'{holder}/'): leaf
      for path, leaf in leaves.items()
      if path.startswith(f'{holder}/')
    }
    if root := parameter_root(state):
      return f'{holder}/{root}'
  for root in _ROOTS:
    if any(path.startswith(f'{root}/') for path in leaves):
      return (
        '' if root == 'model' and _has_modules_beside(root, leaves) else root
      )
  return ''


def _has_modules_beside(root: str, leaves: Mapping[str, Any]) -> bool:
  return any(
    tree.is_merged(leaf.dtype)
    and not below(root, path)
    and not is_training_state(path)
    for path, leaf in leaves.items()
  )


def is_training_state(path: str) -> bool:
  """Whether a path beside the parameters is what training programs keep."""
  return not _TRAINING_STATE.isdisjoint(path.split('/')[:2])


def is_of_optimizer(path: str) -> bool:
  """Whether a path leads to what an optimizer keeps, wherever that lies."""
  return not _OPTIMIZER.isdisjoint(path.split('/'))


def holds(root: str, path: str) -> bool:
  """Whether a leaf is one of the parameters.

  Below a root of their own all are, also those of a module that is called
  `optimizer`; in a whole tree those that no optimizer keeps.
  """
  return below(root, path) and (bool(root) or not is_of_optimizer(path))


def below(root: str, path: str) -> bool:
  """Whether a path lies at or below a root; '' is above everything."""
  return not root or path == root or path.startswith(root + '/')


def mask_name(path: str, root: str) -> str:
  """The name under which a leaf draws its random bits.

  The path below the parameter root without a trailing `value`, so that the same
  parameter has the same masks in a flax nnx State, in linen params and in a
  checkpoint with an optimizer beside it. What lies beside the root keeps its
  whole path.
  """
  name = path[len(root) + 1 :] if root and below(root, path) else path
  return name.removesuffix('/value')
