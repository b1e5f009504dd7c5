"""The numbers of the report as CSV, and the verdicts as Markdown.

merges.csv    every size, base, method, N and setting: the paper's full table
cells.csv     every merge, with what made it
verdicts.csv  every finding, setting and measure
left_out.csv  every finding without each of its categories
several.csv   p values by Holm's correction, of all findings at once
parts.csv     what each effect is the mean of
gates.csv     every gate
untestable.csv  categories that are left out, and why
sweeps.csv    every point of a curve
law.csv       measured losses beside the law's
"""

from collections.abc import Iterator, Mapping, Sequence
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scale_study.analysis import (
  left_out,
  measures,
  names,
  several,
)
from experiments.scale_study.analysis.aggregate import (
  Results,
  SEED,
  SUBSET,
  without_gain,
)
from experiments.scale_study.analysis.law import Fit
from experiments.scale_study.analysis.measures import Measure
from experiments.scale_study.analysis.sweeps import sweep_points
from experiments.scale_study.analysis.verdicts import Verdict

Row = Mapping[str, Any]

_BOUNDS = ('effect', 'low', 'high')
MEASURES: Mapping[str, Measure] = {
  'held_in': measures.held_in,
  'gain_kept': measures.corrected,
  'held_in_base': measures.held_in_base,
  'held_in_multitask': measures.held_in_multitask,
  'held_out': measures.held_out,
  'held_out_multitask': measures.held_out_multitask,
  'drift': measures.drift,
  'loss': measures.loss,
  'loss_of_all': measures.loss_of_all,
}


def write_all(
  results: Results,
  verdicts: Sequence[Verdict],
  fits: Sequence[Fit],
  folder: Path,
) -> None:
  """Writes every table into a folder."""
  tables = {
    'merges': merge_rows(results),
    'cells': _cell_rows(results),
    'verdicts': _verdict_rows(verdicts),
    'left_out': _left_out_rows(results),
    'several': _several_rows(verdicts),
    'parts': _part_rows(verdicts),
    'gates': gate_rows(results),
    'untestable': [exclusion._asdict() for exclusion in results.exclusions],
    'sweeps': _sweep_rows(results),
    'law': _law_rows(fits),
  }
  folder.mkdir(parents=True, exist_ok=True)
  for name, rows in tables.items():
    rows, path = list(rows), folder / f'{name}.csv'
    if not rows:
      # Readers of tables refuse one without columns.
      path.unlink(missing_ok=True)
      continue
    with open(path, 'w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  markdown = verdict_markdown(verdicts)
  (folder / 'verdicts.md').write_text(markdown, 'utf-8')


def merge_rows(results: Results) -> Iterator[Row]:
  """Tabulates every size, base, method, N and setting, with intervals."""
  for setting in ('validated', 'fixed'):
    grid = results.grid(setting)
    if setting not in {cell.setting for cell in grid.cells.values()}:
      continue
    estimates = {
      name: grid.estimate(measure) for name, measure in MEASURES.items()
    }
    run = ~np.isnan(grid.values(measures.drift))
    merges = run.sum(axis=(SEED, SUBSET))
    seeds = np.any(run, axis=SUBSET).sum(axis=0)
    for index in np.ndindex(merges.shape):
      if not merges[index]:
        continue
      i, b, m, k = index
      row = {
        'setting': setting,
        'size': grid.sizes[i],
        'parameters': results.sizes[grid.sizes[i]],
        'base': grid.bases[b],
        'method': grid.methods[m],
        'n': grid.ns[k],
        'seeds': int(seeds[index]),
        'merges': int(merges[index]),
      }
      for name, (value, low, high) in estimates.items():
        row[name] = _written(float(value[index]))
        row[f'{name}_low'] = _written(float(low[index]))
        row[f'{name}_high'] = _written(float(high[index]))
      yield row


def gate_rows(results: Results) -> list[Row]:
  """Tabulates the gates."""
  return [
    {
      'size': gate.size,
      'base': gate.base,
      'category': gate.category,
      'split': gate.split,
      'gate': gate.gate,
      'seed': gate.seed,
      'score': _written(gate.score),
      'chance': '' if gate.chance is None else _written(gate.chance),
      'pass': gate.passed,
    }
    for gate in results.gates
  ]


def verdict_markdown(verdicts: Sequence[Verdict]) -> str:
  """Writes the verdicts as a table for a README."""
  lines = [
    '| | finding of the paper | verdict | effect (95 % interval) | of '
    '| seeds | merges |',
    '|---|---|---|---|---|---|---|',
  ]
  for verdict in verdicts:
    if verdict.is_main:
      effect = names.interval(
        verdict.effect, verdict.low, verdict.high, signed=True, digits=3
      )
      cells = [
        verdict.finding,
        verdict.claim,
        f'**{verdict.verdict}**',
        effect,
        verdict.unit or verdict.reason,
        str(verdict.seeds),
        str(verdict.cells),
      ]
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _cell_rows(results: Results) -> Iterator[Row]:
  for cell in results.cells:
    countable = results.countable[cell.size, cell.base]
    if cell.split == 'validation':
      countable -= without_gain(cell).keys()
    row = {
      'size': cell.size,
      'parameters': cell.parameters,
      'base': cell.base,
      'method': cell.method,
      'n': cell.n,
      'subset': ' '.join(cell.subset),
      'subset_number': cell.subset_number,
      'seed': cell.seed,
      'setting': cell.setting,
      'split': cell.split,
      'hyperparameters': json.dumps(dict(cell.hyperparameters)),
    }
    row |= {
      name: _written(measure(cell, countable))
      for name, measure in MEASURES.items()
    }
    row |= {
      'scores': json.dumps(dict(cell.scores)),
      'checkpoints': json.dumps(dict(cell.checkpoints)),
      'command': cell.command,
    }
    yield row


def _verdict_rows(verdicts: Sequence[Verdict]) -> Iterator[Row]:
  for verdict in verdicts:
    yield {
      'finding': verdict.finding,
      'claim': verdict.claim,
      'setting': verdict.setting,
      'measure': verdict.measure,
      'verdict': verdict.verdict,
      'effect': _written(verdict.effect),
      'low': _written(verdict.low),
      'high': _written(verdict.high),
      'unit': verdict.unit,
      'by_seed': ' '.join(map(_written, verdict.by_seed)),
      'student_low': _written(verdict.student[0]),
      'student_high': _written(verdict.student[1]),
      'seeds': verdict.seeds,
      'cells': verdict.cells,
      'reason': verdict.reason,
    }


def _left_out_rows(results: Results) -> Iterator[Row]:
  for row in left_out.each(results):
    bounds = {name: _written(getattr(row, name)) for name in _BOUNDS}
    yield {**row._asdict(), **bounds}


def _several_rows(verdicts: Sequence[Verdict]) -> Iterator[Row]:
  for row in several.corrected(verdicts):
    yield {
      'finding': row.finding,
      'alone': _written(row.alone),
      'one_sided': _written(row.one_sided),
      'two_sided': _written(row.two_sided),
    }


def _part_rows(verdicts: Sequence[Verdict]) -> Iterator[Row]:
  for verdict in verdicts:
    for part in verdict.parts:
      yield {
        'finding': verdict.finding,
        'setting': verdict.setting,
        'measure': verdict.measure,
        'part': ', '.join(part.where),
        'effect': _written(part.effect),
        'low': _written(part.low),
        'high': _written(part.high),
      }


def _sweep_rows(results: Results) -> Iterator[Row]:
  for point in sweep_points(results):
    by_seed = ' '.join(map(_written, point.by_seed.values()))
    yield {**point._asdict(), 'by_seed': by_seed}


def _law_rows(fits: Sequence[Fit]) -> Iterator[Row]:
  for fit in fits:
    for point in fit.points:
      where = {'base': fit.base, 'method': fit.method, 'form': fit.form}
      yield where | dataclasses.asdict(point)


def _written(value: float) -> str:
  return '' if np.isnan(value) else f'{value:.6g}'
