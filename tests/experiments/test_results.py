"""The committed results say what the documents say, and follow from cells."""

import collections
import csv
import dataclasses
import functools
import importlib
import json
import pathlib
import re

import numpy as np
import pytest

from experiments.scale_study import configs, loading, study_config
from experiments.scale_study.analysis import (
  accuracies,
  aggregate,
  effects,
  law,
  left_out,
  measures,
  sweeps,
  verdicts,
)
from experiments.scale_study.analysis.aggregate import Results

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'experiments' / 'results'
PAGE = 'docs/scale_study.md'
FINDINGS = ('1', '2', '3a', '3b', '4', '5')
SPLITS = {'held_in': measures.held_in, 'held_out': measures.held_out}


@functools.cache
def results_of(preset):
  """Read once: it takes as long as what is made of it."""
  return Results.load(RESULTS / preset)


def judged(preset):
  return json.loads((RESULTS / preset / 'verdicts.json').read_text())


@pytest.mark.parametrize('preset', ['cpu', 'full', 'smollm2'])
def test_verdicts_follow_from_the_cells(preset):
  again = verdicts.by_finding(verdicts.judge_all(results_of(preset)))
  stored = judged(preset)
  assert again.keys() == stored.keys()
  for finding, verdict in stored.items():
    assert again[finding]['verdict'] == verdict['verdict']
    for name in ('effect', 'low', 'high'):
      if verdict[name] is not None:
        # Means of some thousand float64 values, by another NumPy perhaps.
        assert again[finding][name] == pytest.approx(verdict[name], abs=1e-9)


def laws(preset):
  """Of `law.json`, where null is NaN."""
  text = (RESULTS / preset / 'law.json').read_text('utf-8')
  return json.loads(text.replace('null', 'NaN'))


def rows_of(preset, table):
  """Of a table, which is not there where it would have none."""
  path = RESULTS / preset / 'tables' / f'{table}.csv'
  if not path.exists():
    return []
  with path.open() as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize('preset', ['cpu', 'full', 'smollm2'])
def test_the_law_follows_from_the_cells(preset):
  fits, stored = law.fit_all(results_of(preset)), laws(preset)
  # Least squares by another SciPy or processor; seen were 2e-6.
  near = functools.partial(pytest.approx, abs=1e-5, nan_ok=True)
  points = []
  for fit, said in zip(fits, stored, strict=True):
    again = dataclasses.asdict(fit)
    numbers, seen = again.pop('parameters'), again.pop('points')
    assert numbers == near(said.pop('parameters'))
    for point, other in zip(seen, said.pop('points'), strict=True):
      assert point == near(other)
    points += seen
    again['undetermined'] = [*again['undetermined']]
    for name, value in said.items():
      number = isinstance(value, float)
      assert again[name] == (near(value) if number else value)
    if fit.form == 'all sizes':
      # Any β does where B is 0, so that none is told.
      assert np.isnan(numbers['beta']) == (numbers['B'] == 0)
  # Six digits of losses below 20.
  table = [float(row['law']) for row in rows_of(preset, 'law')]
  assert table == pytest.approx([point['law'] for point in points], abs=1e-4)


@pytest.mark.parametrize('preset', ['cpu', 'full', 'smollm2'])
def test_sweeps_follow_from_the_cells(preset):
  points = sweeps.sweep_points(results_of(preset))
  for point, row in zip(points, rows_of(preset, 'sweeps'), strict=True):
    # Tables have six digits.
    by_seed = [float(value) for value in row['by_seed'].split()]
    assert by_seed == pytest.approx([*point.by_seed.values()], rel=1e-5)
    for name, value in point._asdict().items():
      if isinstance(value, float):
        told = float(row[name] or 'nan')
        assert told == pytest.approx(value, rel=1e-5, nan_ok=True)
      elif name != 'by_seed':
        assert row[name] == str(value)


def law_errors(preset):
  """Of all curves: of the law, of no change, of a line; [3, curves]."""
  names = ('error', 'error_unchanged', 'error_line')
  return np.array([[fit[name] for fit in laws(preset)] for name in names])


def ends(values, digits=2):
  low, high = (f'{end:.{digits}f}' for end in (min(values), max(values)))
  return f'{low} to {high}'.replace('-', '\u2212')


def test_the_page_says_how_the_law_forecasts():
  (ours, unchanged, line), (cpu, *plain) = map(law_errors, ('full', 'cpu'))
  assert len(ours) == len(cpu) == 8
  assert ((ours < unchanged).sum(), (ours < line).sum()) == (7, 8)
  assert [(cpu < other).sum() for other in plain] == [8, 6]
  assert all(fit['undetermined'] for fit in laws('full'))
  assert (
    'than the forecast of no change in seven of eight curves, and than a line '
    'in log N in all; in all eight some parameters are not settled. In `cpu` '
    'it is better than the first in all eight curves, and than the second in '
    'six.'
  ) in read(PAGE)


def test_the_notes_say_how_far_the_law_is_off():
  notes, errors = read('BUILD_NOTES.md'), law_errors('full')
  worse = errors[0] > errors[1]
  r_squared, predicted = (
    np.array([fit[name] for fit in laws('full')])
    for name in ('r_squared', 'r_squared_predicted')
  )
  ours, unchanged, line = (f'{mean:.2f}' for mean in errors.mean(axis=1))
  assert f'an R² of {ends(r_squared, 3)} (twelve points' in notes
  assert (
    f'mean error of {ours} nats, against {unchanged} for the forecast of no '
    f'change and {line} for a line in log N: better than the first in seven of '
    f'eight curves, R² {ends(predicted[~worse])}, and than the second in all. '
    'Averaging from the instruction-tuned base is the eighth '
    f'({predicted[worse].item():.1f})'.replace('(-', '(\u2212')
  ) in notes
  ours, unchanged, line = (
    f'{ends(of)}{unit} ({of.mean():.2f})'
    for of, unit in zip(law_errors('cpu'), (' nats', '', ''), strict=True)
  )
  predicted = [fit['r_squared_predicted'] for fit in laws('cpu')]
  assert (
    f'mean error of {ours}, against {unchanged} for the forecast of no change '
    f'and {line} for a line in log N: better than the first in all eight '
    f'curves, and than the second in six. R² is {ends(predicted)} (median '
    f'{np.median(predicted):.2f})'
  ) in notes


@pytest.mark.parametrize(
  'preset,settings',
  [('cpu', ['seeds=0,1,2,3,4,5']), ('full', []), ('smollm2', [])],
)
def test_a_study_goes_on_in_the_committed_results(preset, settings):
  module = importlib.import_module(f'{configs.__name__}.{preset}')
  config = functools.reduce(study_config.override, settings, module.CONFIG)
  record = json.loads((RESULTS / preset / 'config.json').read_text())
  # Results of before questions were recorded do not say which they were, and
  # those of `smollm2` are made of what Debian's list of packages said then.
  asked = record.pop('questions', None)
  if asked and config.tasks == 'procedural':
    assert asked == loading.digest(config, loading.load_source(config))
  assert study_config.differences(config, record) == {}


@pytest.mark.parametrize('preset', ['cpu', 'full', 'smollm2'])
def test_accuracies_follow_from_the_cells(preset):
  folder = RESULTS / preset
  results, questions = results_of(preset), accuracies.load_questions(folder)
  for cell in results.cells:
    if cell.split == 'test':
      assert questions.keys() == {*cell.held_in, *cell.held_out}
  text = accuracies.text(results, questions)
  assert (folder / 'tables' / 'accuracies.md').read_text('utf-8') == text


def test_the_readme_has_the_accuracies_of_the_real_model():
  text = (RESULTS / 'smollm2/tables/accuracies.md').read_text('utf-8')
  rows = [
    [entry.strip() for entry in line.strip('|').split('|')]
    for line in text.splitlines()
  ]
  of = {name: dict(zip(rows[0][1:], row, strict=True)) for name, *row in rows}
  names = ['base', 'experts', 'multitask']
  names += [f'{m}, N = 4' for m in ('average', 'task_arithmetic')]
  names += ['dare_ties, N = 4', 'ties, N = 4']
  for column in ('**held-in**', 'sentence completion'):
    told = ' | '.join(of[name][column].partition(' ')[0] for name in names)
    assert f' | {told} |' in read('README.md')


def gaps(split):
  """Of validated merges: best method − task arithmetic, and − averaging."""
  groups = collections.defaultdict(dict)
  for preset in ('cpu', 'full', 'smollm2'):
    with (RESULTS / preset / 'tables' / 'merges.csv').open() as file:
      for row in csv.DictReader(file):
        if row['setting'] == 'validated':
          group = preset, row['size'], row['base'], row['n']
          groups[group][row['method']] = float(row[split])
  return [
    (
      max(of.values()) - of['task_arithmetic'],
      of['task_arithmetic'] - of['average'],
    )
    for of in groups.values()
  ]


def test_the_readme_says_how_far_task_arithmetic_is_behind():
  text = ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())
  behind, ahead = np.transpose(gaps('held_in'))
  behind_held_out = max(gap for gap, _ in gaps('held_out'))
  said = (
    f'task arithmetic is at most {max(behind):.2f} behind the best on held-in '
    f'tasks and {behind_held_out:.2f} on held-out ones'
  )
  assert said in text
  assert (ahead > 0).all()
  # Over the categories that pass their gates everywhere.
  first, second = (f'{max(gated_gaps(split)):.2f}' for split in SPLITS)
  assert f'{first} and {second} over only the categories' in text


def gated_gaps(split):
  """Of each preset, how far task arithmetic is behind at most."""
  for preset in ('cpu', 'full', 'smollm2'):
    grid = results_of(preset).grid('validated', gated=True)
    values = grid.alike(aggregate.SIZE, aggregate.BASE).values(SPLITS[split])
    # [seeds, subsets, sizes, bases, methods, n] to [sizes, bases, methods, n].
    means = np.nanmean(np.nanmean(values, axis=1), axis=0)
    own = means[:, :, [grid.methods.index('task_arithmetic')]]
    yield np.nanmax(means - own)


def read(name):
  return ' '.join((ROOT / name).read_text(encoding='utf-8').split())


def signed(value):
  return f'{value:+.3f}'.replace('-', '\u2212')


def test_the_page_says_where_held_in_does_not_rise():
  """Over subsets, then methods and N, then seeds, as finding 2 has it."""
  grid = results_of('full').grid('validated', gated=True)
  values = grid.alike(effects.SIZE).values(measures.held_in)
  # [seeds, subsets, sizes, bases, methods, n] to [seeds, sizes, bases]
  by_seed = np.nanmean(values, axis=1).mean(axis=(-2, -1))
  said = {
    base: ', '.join(f'{mean:.2f}' for mean in by_seed.mean(axis=0)[:, i])
    for i, base in enumerate(grid.bases)
  }
  page, notes = read(PAGE), read('BUILD_NOTES.md')
  for base, numbers in said.items():
    told = ' and '.join(numbers.rsplit(', ', 1))
    assert f'{told} from the {base}' in page and told in notes
  # From l to xl, of the pretrained base.
  first, second, third = map(signed, by_seed[:, 3, 0] - by_seed[:, 2, 0])
  assert f'two seeds of three ({first}, {second} and {third})' in page


def test_the_page_says_what_averaging_does_to_the_spread():
  said = []
  for preset in ('full', 'cpu'):
    results = results_of(preset)
    tuned = [cell for cell in results.cells if cell.method != 'average']
    grid = dataclasses.replace(results, cells=tuple(tuned)).grid()
    effect = effects.spread_shrinks(grid, measures.held_in)
    verdict = verdicts.judge('5', effect, 'validated', 'ratio')
    effect, low, high = map(signed, (verdict.effect, verdict.low, verdict.high))
    said.append(f'{effect} ({low} to {high})')
  assert f'without it the effect is {said[0]}, in `cpu` {said[1]}' in read(PAGE)
  means = collections.defaultdict(dict)
  for preset in ('full', 'cpu'):
    with (RESULTS / preset / 'tables' / 'merges.csv').open() as file:
      for row in csv.DictReader(file):
        if (row['setting'], row['n']) == ('validated', '8'):
          arm = preset, row['size'], row['base']
          means[arm][row['method']] = float(row['held_in'])
  assert len(means) == 12
  assert {min(of, key=of.get) for of in means.values()} == {'average'}


def test_the_page_says_what_is_there_before_any_merge():
  said = [
    {
      finding: signed(other['effect'])
      for finding in '12'
      for other in judged(preset)[finding]['others']
      if other['measure'] == verdicts.UNMERGED
    }
    for preset in ('full', 'cpu')
  ]
  full, cpu = said
  text = read(PAGE)
  assert f'gives {full["1"]} (`cpu`: {cpu["1"]}), but {full["2"]} of 2 ' in text
  assert f'of 2 (`cpu`: {cpu["2"]})' in text


def test_the_readme_has_the_verdicts():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  _, table = text.split('| finding of the paper |')
  rows = table.split('\n\n')[0].splitlines()[2:]
  assert len(rows) == len(FINDINGS)
  for finding, row in zip(FINDINGS, rows, strict=True):
    _, _, *said, _, _ = row.split('|')
    for preset, words in zip(('full', 'cpu'), said, strict=True):
      verdict = judged(preset)[finding]
      numbers = [
        float(number.replace('\u2212', '-'))
        for number in re.findall(r'[+\u2212][\d.]+', words)
      ]
      # Findings are told with three decimals.
      assert numbers == pytest.approx(
        [verdict['effect'], verdict['low'], verdict['high']], abs=5.1e-4
      )
      assert ('**supported**' in words) == (verdict['verdict'] == 'supported')
      assert ('opposite' in words) == (verdict['high'] < 0)


def test_the_page_says_what_seeds_say_on_which_nothing_was_chosen():
  results = results_of('cpu')
  seeds = (3, 4, 5)
  alone = dataclasses.replace(
    results,
    cells=tuple(cell for cell in results.cells if cell.seed in seeds),
    gates=tuple(gate for gate in results.gates if gate.seed in seeds),
  )
  found = {v.finding: v for v in verdicts.judge_all(alone) if v.is_main}
  first, second, third = (found[finding] for finding in ('1', '2', '3a'))
  assert first.seeds == second.seeds == third.seeds == 3
  assert (
    f'support 1 ({signed(first.effect)}, from {signed(first.low)} to '
    f'{signed(first.high)}), 2 ({signed(second.effect)}, from '
    f'{signed(second.low)}) and the first half of 3 '
    f'({signed(third.effect)}, from {signed(third.low)})'
  ) in read(PAGE)
  assert {found[f].verdict for f in ('1', '2', '3a')} == {'supported'}
  assert found['3b'].high < 0
  assert f'(from {signed(second.student[0])})' in read(PAGE)
  assert f'is {signed(found["5"].effect)} in them' in read(PAGE)


def test_the_page_says_on_which_categories_verdicts_hang():
  hang = {}
  for preset in ('full', 'cpu'):
    rows = list(left_out.each(results_of(preset)))
    with (RESULTS / preset / 'tables' / 'left_out.csv').open() as file:
      stored = list(csv.DictReader(file))
    assert [(r.finding, r.category, str(r.differs)) for r in rows] == [
      (r['finding'], r['category'], r['differs']) for r in stored
    ]
    hang[preset] = [(r.finding, r.category) for r in rows if r.differs]
  assert [finding for finding, _ in hang['full']] == ['4', '5', '5', '5']
  assert ('4', 'summarization') in hang['full']
  assert [finding for finding, _ in hang['cpu']] == ['4', '4', '4']


def test_held_in_falls_with_the_number_of_experts_in_cpu():
  """For both bases and sizes, as the mean over methods."""
  grid = results_of('cpu').grid()
  assert grid.ns == (2, 4, 6, 8)
  means = np.nanmean(grid.means(measures.held_in), axis=2)
  assert means.shape == (2, 2, 4)  # [sizes, bases, n]
  assert (np.diff(means) < 0).all()


def test_full_has_verdicts_on_four_findings():
  said = [judged('full')[finding]['verdict'] for finding in '12345']
  assert sum(verdict != 'not testable' for verdict in said) >= 4
