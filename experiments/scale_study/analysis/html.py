"""The report: one HTML file that needs nothing else.

Every sentence about results is made from the data; what is fixed is how to
read them.
"""

import base64
from collections.abc import Sequence
import dataclasses
import html
import json

from experiments.scale_study.analysis import names, what_was_run
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.cards import findings
from experiments.scale_study.analysis.figures.picture import Picture
from experiments.scale_study.analysis.law import Fit
from experiments.scale_study.analysis.markup import paragraphs
from experiments.scale_study.analysis.methods import METHODS
from experiments.scale_study.analysis.sections import (
  gates,
  law,
  numbers,
  written_answers,
)
from experiments.scale_study.analysis.stylesheet import CSS
from experiments.scale_study.analysis.verdicts import Verdict
from experiments.scale_study.analysis.what_was_run import Run
from experiments.scale_study.analysis.written import Written

_TITLE = 'What matters for merging? The paper’s findings, tested'
_SECTIONS = {
  'run': 'What was run',
  'findings': 'Findings',
  'figures': 'Figures',
  'law': 'Merging law',
  'gates': 'Gates',
  'written': 'Written answers',
  'numbers': 'All numbers',
  'tracing': 'Tracing a number',
}


def render(
  results: Results,
  judged: Sequence[Verdict],
  fits: Sequence[Fit],
  pictures: Sequence[tuple[Picture, bytes]],
  answers: Sequence[Written] = (),
  run: Run = what_was_run.UNKNOWN,
  questions: int = 0,
) -> str:
  """Writes the report.

  Args:
    results: what was run.
    judged: the verdicts.
    fits: of the merging law.
    pictures: each with its PNG.
    answers: what models wrote.
    run: how the merges were made.
    questions: of a task of the test, at most; 0 if it is not known.
  """
  links = ''.join(
    f'<a href="#{name}">{title}</a>' for name, title in _SECTIONS.items()
  )
  bodies = (
    what_was_run.section(results, run),
    findings(results, judged, questions),
    ''.join(_figure(*item) for item in pictures),
    law(fits),
    gates(results),
    written_answers(answers),
    numbers(results),
    _tracing(results),
  )
  sections = ''.join(
    f'<section id="{name}"><h2>{title}</h2>{body}</section>'
    for (name, title), body in zip(_SECTIONS.items(), bodies, strict=True)
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<link rel="icon" href="data:,">'
    f'<title>{_TITLE}</title><style>{CSS}</style></head><body><main>'
    f'<h1>{_TITLE}</h1>{_overview(results)}<nav>{links}</nav>{sections}'
    '</main></body></html>\n'
  )


def _overview(results: Results) -> str:
  sizes = names.join(
    f'{size} ({names.amount(count)} parameters)'
    for size, count in results.sizes.items()
  )
  merges = [cell for cell in results.cells if cell.setting != 'sweep']
  # The same merge may be what was chosen, what is fixed, and scored twice.
  distinct = {
    (
      *(cell.size, cell.base, cell.seed, cell.subset, cell.method),
      json.dumps(cell.hyperparameters, sort_keys=True),
    )
    for cell in merges
  }
  bases = names.join(dict.fromkeys(cell.base for cell in merges))
  methods = names.join(
    names.title(method)
    for method in METHODS
    if method in {cell.method for cell in merges}
  )
  ns = names.join(map(str, sorted({cell.n for cell in merges})))
  return paragraphs(
    f'{names.counted(len(distinct), "merge")} of N = {ns} experts were scored: '
    f'by {methods}; from {bases} bases; of size {sizes}; '
    f'{names.counted(len(results.seeds), "seed")}. They repeat the grid of '
    'Yadav et al., “What Matters for Model Merging at Scale?” (arXiv '
    '2410.03617), with small models.',
    'Scores are averaged within a category. Held-in ones are then divided by '
    'those of its expert, held-out ones by those of the base, and means are '
    'taken over categories, subsets and seeds.',
  )


def _figure(picture: Picture, png: bytes) -> str:
  data = base64.b64encode(png).decode()
  alternative = html.escape(f'{picture.heading}. {picture.reading}', True)
  return (
    f'<h3>{html.escape(picture.heading)}</h3>{paragraphs(picture.reading)}'
    f'<figure><div><img alt="{alternative}" '
    f'src="data:image/png;base64,{data}"></div>'
    f'<figcaption>{html.escape(picture.caption)}</figcaption></figure>'
  )


def _tracing(results: Results) -> str:
  merges = [*results.grid().cells.values()] or results.cells
  cell = merges[0]
  group = [
    c
    for c in merges
    if (c.setting, c.size, c.base, c.method, c.n)
    == (cell.setting, cell.size, cell.base, cell.method, cell.n)
  ]
  example = json.dumps(dataclasses.asdict(cell), indent=2, ensure_ascii=False)
  return (
    paragraphs(
      'A row of the table above is the mean of the lines of cells.jsonl with '
      'its setting, size, base, method and N, over the categories that are '
      'testable for its size and base. Each line names the categories '
      'merged, the hyperparameters, the seed, the fingerprint of the base and '
      'of every expert, the scores of merge, experts, base and multitask '
      'model, and the command that makes it again. tables/cells.csv has the '
      'same lines with their ratios. What they have in common, from the shapes '
      'of models to learning rates, is in config.json; seconds.jsonl has the '
      'commit, the machine and the seconds of each part (size/base/seed) and '
      'phase, where they were recorded.',
      f'For instance {cell.setting}, {cell.size}, {cell.base}, '
      f'{names.title(cell.method)}, N = {cell.n}: {len(group)} lines, the '
      'first of which is:',
    )
    + f'<pre>{html.escape(example)}</pre>'
    + paragraphs(
      'Every result here is computed from cells.jsonl and gates.json (answers '
      'that are written are in rouge_l.csv) by:'
    )
    + '<pre>python -m experiments.scale_study.analysis RESULTS_DIR</pre>'
  )
