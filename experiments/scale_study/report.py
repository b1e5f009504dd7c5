"""The results of a run as text, CSV, JSON and one picture."""

import csv
import dataclasses
import json
from pathlib import Path

from matplotlib.figure import Figure

from experiments.scale_study.results import Results

_COLORS = {
  'base': '#c3c7cf',
  'expert': '#3b4252',
  'average': '#8fbcbb',
  'task_arithmetic': '#5e81ac',
  'ties': '#d08770',
  'dare_ties': '#b48ead',
}


def table(results: Results) -> str:
  """Lays out the scores by task and the seconds by stage."""
  rows = results.rows()
  columns = list(rows[0])
  cells = [columns, *([_cell(row[c]) for c in columns] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    '  '.join(
      cell.ljust(width) if column == 'task' else cell.rjust(width)
      for column, cell, width in zip(columns, line, widths, strict=True)
    )
    for line in cells
  ]
  seconds = [
    f'{stage:<24}{seconds:6.1f} s'
    for stage, seconds in (
      *results.seconds.items(),
      ('total', sum(results.seconds.values())),
    )
  ]
  return '\n'.join([*lines, '', *seconds])


def write(results: Results, output_dir: Path) -> None:
  """Writes results.csv, results.json and results.png."""
  output_dir.mkdir(parents=True, exist_ok=True)
  rows = results.rows()
  with open(output_dir / 'results.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  record = dataclasses.asdict(results) | {'failures': results.failures()}
  (output_dir / 'results.json').write_text(json.dumps(record, indent=2) + '\n')
  plot(results).savefig(output_dir / 'results.png', dpi=160)


def plot(results: Results) -> Figure:
  """Draws a group of bars per task, with chance as a line across the group."""
  rows = results.rows()
  models = [name for name in rows[0] if name not in ('task', 'chance')]
  figure = Figure(figsize=(10, 4.4), layout='constrained')
  axes = figure.subplots()
  width = 0.86 / len(models)
  for position, name in enumerate(models):
    offset = (position - (len(models) - 1) / 2) * width
    bars = axes.bar(
      [group + offset for group in range(len(rows))],
      [row[name] for row in rows],
      0.9 * width,
      color=_COLORS.get(name),
      label=_title(name),
    )
    axes.bar_label(
      bars, fmt=lambda value: f'{100 * value:.0f}', fontsize=7, padding=1.5
    )
  for group, row in enumerate(rows):
    axes.hlines(
      row['chance'],
      group - 0.46,
      group + 0.46,
      colors='#bf616a',
      linestyles='dashed',
      linewidth=1.2,
      label='chance' if group == 0 else '',
    )
  axes.axvline(len(rows) - 1.5, color='#d8dee9', linewidth=1)
  axes.set_xticks(range(len(rows)), [_title(str(row['task'])) for row in rows])
  axes.tick_params(axis='both', length=0)
  axes.set_xlim(-0.55, len(rows) - 0.45)
  axes.set_ylim(0, 1.08)
  axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ['0', '25', '50', '75', '100'])
  axes.set_ylabel('test accuracy (%)')
  axes.grid(axis='y', color='#e5e9f0')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.set_title(
    f'{len(results.experts)} experts of one base and their merges',
    loc='left',
    fontweight='bold',
  )
  figure.legend(
    loc='outside lower center', ncols=len(models) + 1, frameon=False
  )
  return figure


def _cell(value: str | float) -> str:
  return value if isinstance(value, str) else f'{value:.3f}'


def _title(name: str) -> str:
  capitals = {
    'ties': 'TIES',
    'dare_ties': 'Dare-TIES',
    'extractive_qa': 'extractive QA',
  }
  return capitals.get(name, name.replace('_', ' '))
