"""Everything that is computed from the merges of a study, as files."""

from collections.abc import Sequence
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from experiments.scale_study.analysis import (
  accuracies,
  figures,
  html,
  law,
  scores,
  tables,
  verdicts,
  what_was_run,
  written,
)
from experiments.scale_study.analysis.aggregate import Results


def analyse(folder: Path) -> str:
  """Writes everything that is computed from the merges in a folder.

  Args:
    folder: has cells.jsonl and gates.json, and gets the rest.

  Returns:
    The scores, the verdicts, and where the first picture and the report are.
  """
  results = Results.load(folder)
  judged = verdicts.judge_all(results)
  fits = law.fit_all(results)
  _write_json(folder / 'verdicts.json', verdicts.by_finding(judged))
  _write_json(folder / 'law.json', [dataclasses.asdict(fit) for fit in fits])
  tables.write_all(results, judged, fits, folder / 'tables')
  questions = accuracies.load_questions(folder)
  (folder / 'tables' / 'accuracies.md').write_text(
    accuracies.text(results, questions), 'utf-8'
  )
  (folder / 'figures').mkdir(exist_ok=True)
  pictures = []
  for picture in figures.draw_all(results, judged, fits):
    buffer = io.BytesIO()
    # Nothing of the version that drew it, so that the same bytes come out.
    picture.figure.savefig(
      buffer, format='png', dpi=150, metadata={'Software': None}
    )
    png = buffer.getvalue()
    (folder / 'figures' / f'{picture.name}.png').write_bytes(png)
    pictures.append((picture, png))
  # The scores, where there are some.
  drawn = [folder / 'figures' / f'{p.name}.png' for p, _ in pictures[:1]]
  report = folder / 'report.html'
  page = html.render(
    results,
    judged,
    fits,
    pictures,
    written.load(folder),
    what_was_run.load(folder),
    max(questions.values(), default=0),
  )
  report.write_text(page, 'utf-8')
  return '\n'.join(
    [
      f'{scores.text(scores.tables(results))}\n',
      *_said(judged),
      *(f'Wrote {path}' for path in (*drawn, report)),
    ]
  )


def _said(judged: Sequence[verdicts.Verdict]) -> list[str]:
  main = [v for v in judged if v.is_main and v.finding in '12345']
  if all(verdict.verdict == 'not testable' for verdict in main):
    return ['None of the five findings is testable: the report says why.']
  return [
    f'{verdict.finding}. {verdict.claim}: {verdict.verdict} ({verdict.reason})'
    for verdict in main
  ]


def _write_json(path: Path, record: Any) -> None:
  text = json.dumps(_plain(record), indent=2, ensure_ascii=False)
  path.write_text(text + '\n', 'utf-8')


def _plain(value: Any) -> Any:
  """Replaces NaN, which JSON does not have, by null."""
  if isinstance(value, dict):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return None if isinstance(value, float) and math.isnan(value) else value
