"""Paths of trees: rules by regular expression, comparisons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
import functools
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mergekit_jax import checks

_Value = TypeVar('_Value')

_LAYERS = re.compile(r'(.*/)?(\w+_)?layers/(?!\d+(/|$)).*')
_LORA = re.compile(r'(.*[/._])?lora_[ab]([/._].*)?', re.IGNORECASE)


def path_of(keys: Any) -> str:
  """The path of a leaf: the keys that lead to it, joined by '/'."""
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
  """The leaves of a tree by path, keys joined by '/', and its structure.

  Raises:
    ValueError: if two leaves have the same path.
  """
  with_paths, structure = jax.tree.flatten_with_path(tree)
  leaves = {}
  for keys, leaf in with_paths:
    path = path_of(keys)
    if path in leaves:
      raise ValueError(f'Two leaves of the tree have the path {path!r}.')
    leaves[path] = leaf
  return leaves, structure


@functools.cache
def is_merged(dtype: Any) -> bool:
  """Whether leaves of this dtype are merged; others are copied."""
  return jnp.issubdtype(dtype, jnp.floating)


def merged_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The shapes of the leaves that are merged, by path."""
  return {
    path: leaf.shape for path, leaf in leaves.items() if is_merged(leaf.dtype)
  }


def first_match(
  rules: Mapping[str, _Value] | None,
  paths: Iterable[str],
  name: str,
  others: Iterable[str] = (),
) -> dict[str, _Value]:
  """The first rule whose regular expression matches each whole path.

  Args:
    rules: values by regular expression, in order.
    paths: the paths to match.
    name: what to call the rules in an error.
    others: paths that there are, but that rules are not for.

  Returns:
    The values of the paths that have one.

  Raises:
    ValueError: if an expression is malformed, matches no path, or none that an
      earlier one does not.
  """
  paths = list(paths)
  found: dict[str, _Value] = {}
  for expression, value in (rules or {}).items():
    try:
      matches = [path for path in paths if re.fullmatch(expression, path)]
    except re.error as error:
      raise ValueError(
        f'{name}: {expression!r} is not a regular expression: {error}.'
      ) from error
    if not matches:
      for path in others:
        if re.fullmatch(expression, path):
          raise ValueError(
            f'{name}: {expression!r} matches only what is not merged, such as '
            f'{path!r}: it holds no floating-point numbers, or lies beside the '
            'parameters. Leave the expression out.'
          )
      example = paths[0] if paths else 'none'
      raise ValueError(
        f'{name}: {expression!r} matches no path. Expressions must match '
        f'whole paths as `mergekit-jax inspect` prints them, such as '
        f'{example!r}.{checks.nearest(expression, paths)}'
      )
    if all(path in found for path in matches):
      raise ValueError(
        f'{name}: {expression!r} comes too late: all that it matches, such as '
        f'{matches[0]!r}, an earlier expression matches, and the first wins. '
        'Put it before that one, or leave it out.'
      )
    for path in matches:
      found.setdefault(path, value)
  return found


def stacked_axes(
  rules: Mapping[str, int | tuple[int, ...]] | None,
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
  """The axes over which layers are stacked in each leaf, ascending.

  Raises:
    ValueError: if a rule matches nothing or names an axis a leaf lacks.
  """
  matched = first_match(rules, shapes, 'stacked_axes')
  result = {path: () for path in shapes}
  for path, axes in matched.items():
    axes = np.atleast_1d(axes)
    rank = len(shapes[path])
    whole = np.issubdtype(axes.dtype, np.integer)
    if not whole or not all(-rank <= axis < rank for axis in axes):
      raise ValueError(
        f'stacked_axes: {path} has shape {shapes[path]} and no axis '
        f'{tuple(axes.tolist())}.'
      )
    result[path] = tuple(sorted({int(axis) % rank for axis in axes}))
  return result


def looks_stacked(path: str, shape: tuple[int, ...]) -> bool:
  """Whether a leaf may hold several layers: below 'layers', unnumbered."""
  return len(shape) > 1 and bool(_LAYERS.fullmatch(path))


def lora_factors(paths: Iterable[str]) -> list[str]:
  """The leaves that are called like factors of LoRA adapters."""
  return [path for path in paths if _LORA.fullmatch(path)]


def differences(
  name: str, reference: Mapping[str, Any], other: Mapping[str, Any]
) -> list[str]:
  """What keeps two sets of leaves from being merged, a line each.

  Args:
    name: what to call the other.
    reference: leaves (anything with a shape and a dtype) by path.
    other: likewise.

  Returns:
    A line for every path that is missing, extra, or of another shape, or is
    floating point in only one of the two; one line if they share no path.
  """
  if reference and other and not reference.keys() & other.keys():
    return [
      f'{name} has none of the {len(reference):,} paths expected: '
      f'{min(other)} is its first, {min(reference)} that of the others'
    ]
  lines = []
  for path in sorted(reference.keys() | other.keys()):
    if path not in other:
      lines.append(f'{path}: missing in {name}')
    elif path not in reference:
      lines.append(f'{path}: only in {name}, {_describe(other[path])}')
    else:
      a, b = reference[path], other[path]
      kinds = is_merged(a.dtype), is_merged(b.dtype)
      if a.shape != b.shape or kinds[0] != kinds[1]:
        lines.append(
          f'{path}: {_describe(b)} in {name}, {_describe(a)} expected'
        )
  return lines


def only_in(
  others: Iterable[Mapping[str, Any]], reference: Mapping[str, Any]
) -> list[str]:
  """Paths of floating-point leaves that others have and the reference lacks."""
  return [
    path
    for path, leaf in {
      p: x for other in others for p, x in other.items()
    }.items()
    if path not in reference and is_merged(leaf.dtype)
  ]


def _describe(leaf: Any) -> str:
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def demand_same(
  reference: Mapping[str, Any],
  others: Mapping[str, Mapping[str, Any]],
  kept: Collection[str],
) -> None:
  """Raises one ValueError that lists the differences, if there are any.

  Args:
    reference: leaves by path.
    others: likewise, by what to call them.
    kept: paths that stay as the reference has them, or are left out where it
      has none, and may differ.
  """
  compared = lambda leaves: {
    path: leaf for path, leaf in leaves.items() if path not in kept
  }
  lines = [
    line
    for name, other in others.items()
    for line in differences(name, compared(reference), compared(other))
  ]
  if not lines:
    return
  quantised = [
    path
    for other in others.values()
    for path, leaf in compared(reference).items()
    if path in other and _holds_codes(leaf, other[path])
  ]
  factors = lora_factors(
    path
    for other in others.values()
    for path in sorted(compared(reference).keys() ^ compared(other).keys())
  )
  advice = ''
  if quantised:
    advice += (
      f'\n{quantised[0]} looks quantised: it holds whole numbers in one model, '
      'floating-point numbers in another. Store all as floating-point numbers '
      'first.'
    )
  if factors:
    # Left out, as other leaves may be, they would take along what was learned.
    advice += (
      f'\n{factors[0]} is called like a factor of a LoRA adapter, which not '
      'all of the models have. Put each adapter into its model first.'
    )
  elif len(lines) > len(quantised):
    advice += (
      f'\nWhat {"else " * bool(quantised)}is to be as the base has it, or is '
      "not in it, may be named: overrides={'regular expression of its path': "
      "'base'}, or --override 'REGEX:base'."
    )
  count = len(lines)
  raise ValueError(
    f'The models differ in {count:,} place{"s" * (count > 1)} and '
    'cannot be merged:\n  ' + '\n  '.join(lines) + advice
  )


def _holds_codes(one: Any, other: Any) -> bool:
  """Whether one of two leaves may be of codes, for the numbers in the other."""
  kinds = is_merged(one.dtype), is_merged(other.dtype)
  return kinds[0] != kinds[1] and any(
    jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in (one, other)
  )
