"""What is worth a warning in a tree of parameters, by paths and dtypes."""

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import Any

import jax.numpy as jnp

from mergekit_jax import roots, tree

# Elements from which on a matrix of whole numbers may hold weights.
_FEWEST_CODES = 2**12
# Of normalization layers in flax and in PyTorch, whose means lie beside it.
_VARIANCE = re.compile(r'(|.*[/._])var(|/value)')
# What moving averages and frozen copies of a model are called.
_COPY = re.compile(
  r'(^|_)(ema|avg|average|averaged|swa|polyak|target|shadow|slow|teacher)(_|$)'
)


def left_out(
  leaves: Mapping[str, Any], paths: Sequence[str], root: str, place: str
) -> list[str]:
  """Of leaves of the base that are not merged, though nothing says so.

  Args:
    leaves: all of the base (anything with a shape and a dtype), by path.
    paths: of leaves beside the parameters.
    root: where the parameters begin. Beside it training state that everybody
      knows is no surprise; of a whole tree it is a guess.
    place: where else the leaves are not.
  """
  unknown = roots.missed(leaves, paths) if root else paths
  if not unknown:
    return []
  if root:
    lie, why = ('lies', 'lie'), 'beside its parameters'
  else:
    lie, why = ('is taken', 'are taken'), 'for what an optimizer keeps'
  return [
    f'{_leaves(unknown)} of the base {_verb(unknown, *lie)} {why} and '
    f'{_verb(unknown, "is", "are")} not {place}: {_some(unknown)}.'
  ]


def of_merged(shapes: Mapping[str, tuple[int, ...]], root: str) -> list[str]:
  """Of leaves that are merged, but may be no weights to merge on their own.

  Args:
    shapes: of the merged leaves by path.
    root: where the parameters begin.
  """
  return [
    *_copies(shapes, root),
    *_adapters(shapes),
    *_statistics(shapes),
  ]


def _copies(shapes: Mapping[str, tuple[int, ...]], root: str) -> list[str]:
  """Of parts of the model that may be copies of others."""
  parts: dict[str, dict[str, tuple[int, ...]]] = {}
  for path, shape in shapes.items():
    name, _, rest = path[len(root) + 1 if root else 0 :].partition('/')
    parts.setdefault(name, {})[rest] = shape
  copies = {
    name: like
    for name, part in parts.items()
    if _COPY.search(name) and '' not in part
    for like, other in parts.items()
    if other == part and not _COPY.search(like)
  }
  return [
    f'{name} is called like a copy of {like}, and has its paths and shapes. It '
    'is merged, and counts wherever a total goes over the whole model. If it '
    'should not, keep it as the base has it: override '
    f"'{f'{root}/' if root else ''}{name}/.*' by 'base'."
    for name, like in copies.items()
  ]


def _adapters(paths: Iterable[str]) -> list[str]:
  factors = tree.lora_factors(paths)
  if not factors:
    return []
  return [
    f'{_leaves(factors)} {_verb(factors, "is a factor", "are factors")} of '
    f'LoRA adapters: {_some(factors)}. '
    'Each is merged by itself, and the product of merged factors is not the '
    'merge of the products: put the adapters into their models first.'
  ]


def _statistics(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
  """Of running statistics, which are no weights."""
  statistics = [
    path
    for path, shape in shapes.items()
    if (found := _VARIANCE.fullmatch(path))
    and shapes.get(f'{found[1]}mean{found[2]}') == shape
  ]
  if not statistics:
    return []
  return [
    f'{_leaves(statistics)} {_verb(statistics, "looks", "look")} like running '
    'variances, of BatchNorm perhaps, with means beside them: '
    f'{_some(statistics)}. They are merged as weights are, and what adds task '
    'vectors may bring a variance below 0. Keep both as the base has them, by '
    "overriding them by 'base'."
  ]


def of_wide(leaves: Mapping[str, Any]) -> list[str]:
  """Of float64, of which rules see no more than float32 holds."""
  paths = [path for path, leaf in leaves.items() if leaf.dtype.itemsize == 8]
  if not paths:
    return []
  return [
    f'{_leaves(paths)} {_verb(paths, "is", "are")} stored in float64: '
    f'{_some(paths)}. Models are rounded to float32 before they are merged, so '
    'what experts changed by less than that is lost, also where the output is '
    'float64.'
  ]


def of_copied(leaves: Mapping[str, Any], copied: Sequence[str]) -> list[str]:
  """Of leaves that are not merged, but may be weights.

  Args:
    leaves: all (anything with a shape, a size and a dtype), by path.
    copied: the paths of those that are not merged.
  """
  return [*_quantised(leaves, copied), *_complex(leaves, copied)]


def _quantised(leaves: Mapping[str, Any], copied: Sequence[str]) -> list[str]:
  """Of leaves that may hold codes of weights: a mean of codes is no weight.

  Matrices of whole numbers are copied, while the scales that belong to them are
  merged; floats of 8 bits are merged as what they are without their scales.
  """
  codes = [
    path
    for path in copied
    if jnp.issubdtype(leaves[path].dtype, jnp.integer)
    and len(leaves[path].shape) > 1
    and leaves[path].size >= _FEWEST_CODES
  ]
  scaled = [
    path
    for path, leaf in leaves.items()
    if tree.is_merged(leaf.dtype)
    and leaf.dtype.itemsize == 1
    and any(f'{path}_{scale}' in leaves for scale in ('scale', 'scale_inv'))
  ]
  warnings = []
  if codes:
    warnings.append(
      f'{_leaves(codes)} of whole numbers {_verb(codes, "is", "are")} copied '
      f'from the base and not merged: {_some(codes)}. If these are quantised '
      'weights, the output is of no use: store the models as floating-point '
      'numbers first.'
    )
  if scaled:
    warnings.append(
      f'{_leaves(scaled)} of 8 bits '
      f'{_verb(scaled, "has scales beside it", "have scales beside them")}, '
      f'which are not applied before the merge: {_some(scaled)}. Store the '
      'models as floating-point numbers first.'
    )
  return warnings


def _complex(leaves: Mapping[str, Any], copied: Sequence[str]) -> list[str]:
  """Of complex numbers: they are weights, and rules compute in float32."""
  paths = [
    path
    for path in copied
    if jnp.issubdtype(leaves[path].dtype, jnp.complexfloating)
  ]
  if not paths:
    return []
  return [
    f'{_leaves(paths)} of complex numbers {_verb(paths, "is", "are")} copied '
    f'from the base and not merged: {_some(paths)}. Store their real and '
    'imaginary parts as leaves of their own first.'
  ]


def _leaves(paths: Sequence[str]) -> str:
  return '1 leaf' if len(paths) == 1 else f'{len(paths)} leaves'


def _verb(paths: Sequence[str], one: str, several: str) -> str:
  return one if len(paths) == 1 else several


def _some(paths: Sequence[str]) -> str:
  return f'{", ".join(paths[:5])}{", …" if paths[5:] else ""}'
