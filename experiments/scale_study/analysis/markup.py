"""Escaped HTML from plain values."""

from collections.abc import Iterable, Sequence
import html
import re
from typing import Any


def paragraphs(*texts: str) -> str:
  """Wraps texts in paragraphs."""
  return ''.join(f'<p>{html.escape(text)}</p>' for text in texts)


def items(texts: Iterable[str]) -> str:
  """Makes a list."""
  inside = ''.join(f'<li>{html.escape(text)}</li>' for text in texts)
  return f'<ul>{inside}</ul>'


def table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
  """Makes a table that scrolls sideways where it has no room."""
  head = ''.join(f'<th>{html.escape(name)}</th>' for name in header)
  body = ''.join(f'<tr>{"".join(map(_data, row))}</tr>' for row in rows)
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _data(value: Any) -> str:
  text = html.escape(str(value))
  kind = ''
  # An interval has no longer word than `to`.
  if re.match(r'[\d+−–]', text) and not re.search(r'[a-z]{3}', text):
    kind = ' class="number"'
  elif len(text) > 40:
    kind = ' class="words"'
  return f'<td{kind}>{text}</td>'
