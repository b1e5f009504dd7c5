"""Which axes hold layers, where a layout is known for stacking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import re
from typing import Any

# What comes before the leaves of layers that MaxText scans.
_OF_MAXTEXT = re.compile(r'(.*?/)??(\w+_)?layers/')
# How the library of Gemma names layers that it has stacked, always over axis 0.
_OF_GEMMA = re.compile(r'transformer/stacked_layers/attention_type_\d+/')


def known(
  metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int] | None:
  """The stacked axes of layouts of MaxText and of Gemma's library.

  MaxText says in its metadata that it scans its layers, but not over which
  axis. That is axis 1 unless somebody chose another, along which leaves of one
  stack differ; of scans in each other the axes are not known.

  Args:
    metadata: of the checkpoint.
    shapes: of the leaves that are merged, by path.

  Returns:
    {regex of a path: axis}, or None if it is no such layout.
  """
  if of_gemma := [path for path in shapes if _OF_GEMMA.match(path)]:
    return {re.escape(path): 0 for path in of_gemma}
  # As text where it has been through safetensors, whose metadata is text.
  if metadata.get('scan_layers') not in (True, 'true'):
    return None
  stacks: dict[str, list[str]] = {}
  for path in shapes:
    if match := _OF_MAXTEXT.match(path):
      stacks.setdefault(match[0], []).append(path)
  return {
    re.escape(path): 1
    for stack, paths in stacks.items()
    if _agree_along_axis_1([shapes[path] for path in paths])
    for path in paths
    if not _OF_MAXTEXT.match(path.removeprefix(stack))
  }


def _agree_along_axis_1(shapes: Sequence[tuple[int, ...]]) -> bool:
  sizes = {shape[1:2] for shape in shapes}
  return len(sizes) == 1 and () not in sizes
