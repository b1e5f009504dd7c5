"""Lines of the files of `p3`, and what is wrong with them."""

from collections.abc import Iterator, Mapping
import json
from pathlib import Path
from typing import Any

from experiments.scale_study.tasks.source import (
  Example,
  HELD_IN,
  HELD_OUT,
  INSTRUCTION,
)
from experiments.scale_study.tasks.tokenizer import spaced

FIELDS = (
  'inputs',
  'targets',
  'answer_choices',
  'category',
  'dataset',
  'template',
)
CATEGORIES = (*HELD_IN, *HELD_OUT, INSTRUCTION)


def records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields the objects of a file, each with where it stands, for errors.

  Raises:
    ValueError: if the file is not UTF-8, or a line no JSON object.
  """
  try:
    with path.open(encoding='utf-8-sig') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          where = f'{path}, line {number}'
          yield _object(line, where), where
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8: {error}. Save it so.') from error


def _object(line: str, where: str) -> dict[str, Any]:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f'{where} is not JSON: {error}.') from error
  if not isinstance(record, dict):
    raise ValueError(f'{where} is {record!r}, not a JSON object.')
  return record


def example(record: Mapping[str, Any], where: str) -> tuple[str, str, Example]:
  """Makes an example of an object.

  Args:
    record: with all `FIELDS`.
    where: it stands.

  Returns:
    Its category, its dataset, and the example.

  Raises:
    ValueError: if it is not as it should be.
  """
  missing = [field for field in FIELDS if field not in record]
  if missing:
    raise ValueError(
      f'{where} lacks {", ".join(missing)}. A line needs all of '
      f'{", ".join(FIELDS)}; answer_choices may be null.'
    )
  for field in ('inputs', 'targets', 'category', 'dataset', 'template'):
    if not isinstance(record[field], str) or not record[field].strip():
      raise ValueError(f'{where}: {field} is {record[field]!r}, not a text.')
  if record['category'] not in CATEGORIES:
    raise ValueError(
      f'{where}: {record["category"]!r} is not a category of the study. '
      f'Use one of {", ".join(CATEGORIES)}.'
    )
  choices = record['answer_choices'] or []
  if not isinstance(choices, list) or not all(
    isinstance(choice, str) for choice in choices
  ):
    raise ValueError(
      f'{where}: answer_choices is {choices!r}, neither a list of texts nor '
      'null.'
    )
  # P3 leaves white space at the edges, which means nothing.
  answer = record['targets'].strip()
  candidates = tuple(dict.fromkeys(choice.strip() for choice in choices))
  if len(candidates) == 1:
    raise ValueError(
      f'{where}: answer_choices is {choices!r}, which leaves nothing to '
      'choose. Give the wrong answers as well, or null for free text.'
    )
  if candidates and answer not in candidates:
    raise ValueError(
      f'{where}: targets is {answer!r}, not one of answer_choices '
      f'{list(candidates)}.'
    )
  alike = len(candidates) - len({*map(spaced, candidates)})
  if alike:
    raise ValueError(
      f'{where}: answer_choices is {choices!r}, where {alike} differ from '
      'others by white space alone, which is lost among words. Leave them out.'
    )
  prompt = record['inputs'].strip()
  return (
    record['category'],
    record['dataset'],
    Example(prompt, answer, candidates),
  )
