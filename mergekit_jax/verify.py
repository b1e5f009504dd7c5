"""Reads a merged checkpoint again and compares it with what was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import json
import math
from typing import Any

from etils import epath
import numpy as np

from mergekit_jax.checkpoint import Checkpoint, companions, open_checkpoint
from mergekit_jax.checkpoint.remote import as_path, real_path
from mergekit_jax.report import report_path, written_item
from mergekit_jax.streaming.sink import checksum


def verify(output: epath.PathLike) -> list[str]:
  """Compares every part of an output with its recorded checksum.

  Of safetensors the configuration, the tokenizer and what else was written
  beside the weights is compared too.

  Later steps that training has saved beside what was written are not looked at.

  Args:
    output: a checkpoint that `merge_checkpoints` wrote, its report beside it,
      or the step or the item in it that was written.

  Returns:
    A sentence for every part or file that is damaged, and every part that
    nobody has recorded; empty if all is well.

  Raises:
    FileNotFoundError: if there is no output, or no report beside it.
    ValueError: if the output is no checkpoint, or the report is damaged.
  """
  item, checksums, beside = _recorded(output)
  checkpoint = open_checkpoint(item)
  parts = [
    sentence
    for path in dict.fromkeys((*checkpoint.specs, *checksums))
    for sentence in _damage(checkpoint, path, checksums.get(path, []))
  ]
  files = [_damage_of(item / name, beside[name]) for name in beside]
  return [*parts, *filter(None, files)]


def _recorded(
  output: epath.PathLike,
) -> tuple[epath.Path, dict[str, Sequence[Any]], dict[str, str]]:
  """What was written, the checksums of its parts by path and of files by name.

  The nearest report counts that is of the output or of something in it.
  """
  given = real_path(as_path(output))
  # An item lies in its output, or in a step of it.
  for top in (given, *[*given.parents][:2]):
    report = report_path(top)
    if not report.exists():
      continue
    try:
      facts = json.loads(report.read_text())
      item = top / written_item(facts)
      checksums = dict(facts['checksums'])
      # Reports were written before there were any in them.
      beside = dict(facts.get('companions', {}))
    except (ValueError, LookupError, TypeError, SyntaxError) as error:
      raise ValueError(
        f'{report} is no report of a merge, or is damaged ({error}); restore '
        'it from a copy, or merge again.'
      ) from error
    if top == given or given in (item, *item.parents):
      return item, checksums, beside
  open_checkpoint(given)  # If there is none, this is what is to be said.
  raise FileNotFoundError(
    f'{report_path(given)} is missing: only with its report beside it can an '
    'output be verified. An output that is moved takes its report along.'
  )


def _damage(
  checkpoint: Checkpoint, path: str, parts: Sequence[Any]
) -> Iterator[str]:
  """Yields a sentence for everything that is wrong with one array.

  Args:
    checkpoint: the output.
    path: the array.
    parts: the origin, the shape and the checksum of each part of it.
  """
  if path not in checkpoint.specs:
    yield f'{path}: missing'
    return
  spec = checkpoint.specs[path]
  recorded = sum(math.prod(shape) for _, shape, _ in parts)
  if recorded != math.prod(spec.shape):
    yield (
      f'{path}: {recorded:,} of its {math.prod(spec.shape):,} elements have a '
      'checksum'
    )
  for origin, shape, expected in parts:
    index = tuple(
      slice(start, start + size)
      for start, size in zip(origin, shape, strict=True)
    )
    block = np.empty(shape, spec.dtype)
    try:
      checkpoint.read_into(path, index, block).result()
    except Exception as error:
      yield f'{path}: the part at {origin} cannot be read: {error}'
      continue
    if checksum(block) != expected:
      yield (
        f'{path}: the part at {origin} of shape {shape} is not what was written'
      )


def _damage_of(file: epath.Path, expected: str) -> str:
  """What is wrong with a file beside the weights; '' if nothing is."""
  try:
    found = companions.digest(file.read_bytes())
  except FileNotFoundError:
    return f'{file}: missing'
  except OSError as error:
    return f'{file}: cannot be read: {error}'
  return '' if found == expected else f'{file}: is not what was written'
