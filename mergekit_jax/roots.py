"""Where the parameters begin in what training programs save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import re
from typing import Any

import jax.numpy as jnp

from mergekit_jax import tree

_ROOTS = (
  *('params/params', 'params', 'target', 'optimizer/target'),  # the old T5X's
  *('model', 'model_params'),
)
# Modules may be called so too.
_MODULES = {'model', 'target'}
# Below these lies what an optimizer keeps: as large as the parameters, of their
# names and shapes, and nothing to merge.
_OPTIMIZER = {
  *('opt_state', 'opt_states', 'optimizer', 'param_states', 'optim'),
  *('optim_state', 'optim_states', 'optimizer_state', 'optimizer_states'),
}
# A language model may be called `opt`, so these names alone do not tell.
_LIKE_AN_OPTIMIZER = re.compile(
  r'(.*_)?(opt|optim|optimizer|adam\w*|sgd|lion|adafactor|rmsprop)(_.*)?'
)
# What optax calls its moments, and what it keeps like them.
_MOMENTS = {
  *('mu', 'nu', 'trace', 'v_row', 'v_col', 'ema', 'sum_of_squares'),
  *('e_g', 'e_x', 'exp_avg', 'grad_acc', 'previous_gradient'),
  *('prev_updates', 'step_sizes'),
}
# How optax calls a counter, and one of what lies beside it in the same state.
_LAYOUTS = {
  'count': _MOMENTS | {'base_optimizer_state', 'diff_updates_memory'},
  'mini_step': {'acc_grads'},
  'step_count': {'weight_sum'},  # schedule-free, whose iterate is but a `z`
  'info/num_linesearch_steps': {'grad'},
}
_TRAINING_STATE = _OPTIMIZER | {
  *('opt', 'state', 'step', 'steps', 'ema', 'ema_params', 'params_ema'),
  *('rng', 'rngs', 'key', 'training_key'),
  *('iterator', 'data', 'metrics', 'loss_scale'),
}
# These hold no arrays of floats, so that one below them is of a module.
_WITHOUT_FLOATS = {
  *('step', 'steps', 'rng', 'rngs', 'key', 'training_key'),
  *('iterator', 'data'),
}
# Below these may lie what the model needs as well: Haiku keeps the statistics
# of BatchNorm in `state`.
_MAY_BE_NEEDED = {'state', 'ema', 'ema_params', 'params_ema'}


def parameter_root(leaves: Mapping[str, Any]) -> str:
  """Where the parameters begin.

  Args:
    leaves: all leaves (anything with a shape and a dtype) by path.

  Returns:
    'params/params', 'params', 'target', 'optimizer/target', 'model' or
    'model_params', the first of them that leads to a leaf; such a root below
    the key that a training state has to itself, as in 'state/params'; else '',
    the whole tree. So it is where something other than training state lies
    beside a 'model' or a 'target', which is then one module of several.
  """
  keys = [path.split('/', 2) for path in leaves]
  kept = _OPTIMIZER | {'opt'}
  holders = {first for first, *rest in keys if rest and rest[0] in kept}
  for holder in sorted(holders - _OPTIMIZER):
    state = {
      path.removeprefix(f'{holder}/'): leaf
      for path, leaf in leaves.items()
      if path.startswith(f'{holder}/')
    }
    root = parameter_root(state)
    if root and _has_optimizer_beside(root, state):
      return f'{holder}/{root}'
  tops = {'/'.join(above) for *above, _ in keys}
  for root in _ROOTS:
    if any(below(root, top) for top in tops):
      is_module = root in _MODULES and _has_modules_beside(root, leaves)
      return '' if is_module else root
  return ''


def _has_optimizer_beside(root: str, leaves: Mapping[str, Any]) -> bool:
  tops = {path.partition('/')[0] for path in leaves}
  if tops & _OPTIMIZER:
    return True
  if root not in _MODULES:
    return root in _ROOTS
  # `opt` may be another module then.
  return any(below('opt', node) for node in _optimizers(leaves))


def _has_modules_beside(root: str, leaves: Mapping[str, Any]) -> bool:
  kept = _optimizers(leaves)
  return any(
    tree.is_merged(leaf.dtype)
    and not below(root, path)
    and not _states(path, leaf)
    and not below('flax_mutables', path)  # of T5X
    and kept.isdisjoint(_lineage(path))
    for path, leaf in leaves.items()
  )


def _states(path: str, leaf: Any) -> set[str]:
  """What training programs keep, by name, to which a leaf may belong."""
  *above, _ = keys = path.split('/')
  names = _TRAINING_STATE.intersection(keys[:2])
  is_array = tree.is_merged(leaf.dtype) and leaf.shape
  return names - _WITHOUT_FLOATS.intersection(above) if is_array else names


def may_be_needed(name: str) -> bool:
  """Whether what a model needs may lie under a name beside its parameters."""
  return name in _MAY_BE_NEEDED or name not in _TRAINING_STATE


def missed(leaves: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
  """The leaves that a model may need of those beside its parameters.

  Args:
    leaves: all leaves (anything with a shape and a dtype) by path.
    paths: of those beside the parameters.
  """
  counted = _counted(_children(leaves), leaves)

  def is_missed(path: str) -> bool:
    if not _OPTIMIZER.isdisjoint(path.split('/')):
      return False
    names = _states(path, leaves[path])
    if not names:
      return True
    if not names <= _MAY_BE_NEEDED or not tree.is_merged(leaves[path].dtype):
      return False
    # optax's may be called `state` as well.
    return names != {'state'} or counted.isdisjoint(_lineage(path))

  return [path for path in paths if is_missed(path)]


def parameters(leaves: Mapping[str, Any], root: str) -> Callable[[str], bool]:
  """Which paths of a model lead to parameters.

  Below a root of their own all do, also those of a module that is called
  `optimizer`; in a whole tree those that no optimizer keeps.

  Args:
    leaves: all leaves (anything with a shape and a dtype) by path.
    root: where its parameters begin (`parameter_root`).

  Returns:
    Whether the path of a leaf, or of a node above leaves, does.
  """
  if root or not (kept := _optimizers(leaves)):
    return lambda path: below(root, path)
  return lambda path: kept.isdisjoint(_lineage(path))


def moved(leaves: Mapping[str, Any], root: str) -> dict[str, str]:
  """The paths of a model's parameters, by those that they have below a root."""
  own = parameter_root(leaves)
  holds = parameters(leaves, own)
  prefix = f'{root}/' if root else ''
  return {
    prefix + (path[len(own) + 1 :] if own else path): path
    for path in leaves
    if holds(path)
  }


def demand_parameters(
  name: str, leaves: Mapping[str, Any], paths: Mapping[str, str]
) -> None:
  """Raises ValueError if all that could be merged is of an optimizer.

  Args:
    name: what to call the model.
    leaves: all its leaves by path.
    paths: from `moved`.
  """
  floats = {p for p, leaf in leaves.items() if tree.is_merged(leaf.dtype)}
  if not paths or (floats and floats.isdisjoint(paths.values())):
    raise ValueError(
      f'{name} has nothing to merge: all it holds is what an optimizer keeps. '
      'Give a model.'
    )


def _optimizers(leaves: Mapping[str, Any]) -> frozenset[str]:
  """The paths at which an optimizer begins.

  Known are its names; states of optax, by a counter and what lies beside it,
  such as moments and their `count`; and what is called like an optimizer, or
  consists of moments, if it repeats the paths and shapes of what lies beside
  it. Modules that are merely alike are none.
  """
  children = _children(leaves)
  named = {
    node
    for node in (*children, *leaves)
    if node.rpartition('/')[2] in _OPTIMIZER
  }
  shapes = {
    path: leaf.shape
    for path, leaf in leaves.items()
    if tree.is_merged(leaf.dtype) and leaf.shape
  }
  arrays: dict[str, list[str]] = {}
  for path in shapes:
    arrays.setdefault(path.partition('/')[0], []).append(path)
  repeated = {
    node for node, copies in arrays.items() if _repeats(node, copies, shapes)
  }
  return frozenset(named | _counted(children, leaves) | repeated)


def _children(leaves: Mapping[str, Any]) -> dict[str, set[str]]:
  """The names of what lies right below each node."""
  children: dict[str, set[str]] = {}
  for path in leaves:
    while path:
      path, _, name = path.rpartition('/')
      names = children.setdefault(path, set())
      if name in names:
        break  # and so are the nodes above in those above them
      names.add(name)
  return children


def _counted(
  children: Mapping[str, set[str]], leaves: Mapping[str, Any]
) -> set[str]:
  """The nodes with moments of optax beside their `count`."""
  return {
    node
    for node, names in children.items()
    for counter, kept in _LAYOUTS.items()
    if names & kept and _counts(node, counter, leaves)
  }


def _counts(node: str, counter: str, leaves: Mapping[str, Any]) -> bool:
  """Whether a whole number of this name lies at a node."""
  path = f'{node}/{counter}' if node else counter
  leaf = leaves.get(path, leaves.get(f'{path}/value'))
  return leaf is not None and jnp.issubdtype(leaf.dtype, jnp.integer)


def _repeats(
  node: str, copies: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
  """Whether all arrays below a top node are copies that an optimizer keeps.

  It keeps them by name: a module at the node itself is a twin.

  Args:
    node: the top node.
    copies: the paths of its arrays of floats.
    shapes: of all of these by path.
  """
  if node in shapes:
    return False  # an array itself
  is_named = _LIKE_AN_OPTIMIZER.fullmatch(node)
  if not is_named and not all(
    _MOMENTS.intersection(path.split('/')) for path in copies
  ):
    return False
  beside = {
    (name, shape)
    for path, shape in shapes.items()
    if not below(node, path)
    for name in (path, path.partition('/')[2])
  }
  return all(
    any(
      (path[len(above) + 1 :], shapes[path]) in beside
      for above in [*_lineage(path)][:-2]
    )
    for path in copies
  )


def _lineage(path: str) -> Iterator[str]:
  """A path and those above it, up to the top of the tree, which is ''."""
  yield path
  while path:
    path, _, _ = path.rpartition('/')
    yield path


def below(root: str, path: str) -> bool:
  """Whether a path lies at or below a root; '' is above everything."""
  return not root or path == root or path.startswith(root + '/')


def mask_name(path: str, root: str) -> str:
  """The name under which a leaf draws its random bits.

  The path below the parameter root without a trailing `value`, so that the same
  parameter has the same masks in a flax nnx State, in linen params and in a
  checkpoint with an optimizer beside it.
  """
  name = path[len(root) + 1 :] if root else path
  return name.removesuffix('/value')
