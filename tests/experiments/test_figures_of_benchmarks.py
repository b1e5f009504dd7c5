"""README and BUILD_NOTES have the committed figures, as precise as printed."""

import functools
import json
import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = ROOT / 'experiments' / 'benchmarks'
FILES = sorted(FIGURES.glob('*.json'))
NOTES = 'BUILD_NOTES.md'
ONE_READ = ('average', 'task_arithmetic', 'dare', 'dare_ties')
TIES = ('ties tensor', 'ties model')


@functools.cache
def figures(name):
  return json.loads((FIGURES / f'{name}.json').read_text())


def rows(name, **chosen):
  return [
    row
    for row in figures(name)['rows']
    if all(row[key] == value for key, value in chosen.items())
  ]


def row(name, **chosen):
  (found,) = rows(name, **chosen)
  return found


@functools.cache
def text(document):
  return (ROOT / document).read_text(encoding='utf-8')


def same(said, *values):
  """Whether a text has these numbers and no other; None is not printed."""
  printed = [
    number.replace(',', '') for number in re.findall(r'\d[\d,]*\.?\d*', said)
  ]
  values = [value for value in values if value is not None]
  assert len(printed) == len(values), f'{said!r}: expected {values}'
  for number, value in zip(printed, values, strict=True):
    unit = 10.0 ** -len(number.partition('.')[2])
    # What lies between two numbers may be printed as either.
    assert abs(float(number) - value) <= unit * (0.5 + 1e-6), (
      f'{said!r}: expected {values}'
    )


def says(document, pattern, *values):
  """Whether the groups of a sentence, which is there once, are these."""
  (found,) = re.finditer(pattern, ' '.join(text(document).split()))
  groups = found.groups()
  assert len(groups) == len(values)
  for group, value in zip(groups, values, strict=True):
    same(group, value)


def says_range(document, pattern, values):
  """Whether its group is what values lie between; one number is both ends."""
  (found,) = re.finditer(pattern, ' '.join(text(document).split()))
  low, _, high = found[1].partition(' to ')
  same(low, min(values))
  same(high or low, max(values))


def around_middle(values):
  """How far values lie from the middle of their range at most, in per cent."""
  low, high = min(values), max(values)
  return 100 * (high - low) / (high + low)


def plain(name):
  """'TIES, per tensor', 'ties tensor' → 'tiestensor'."""
  return re.sub(r'\bper\b|[^a-z0-9.]', '', name.lower())


def table(document, begin, number=0):
  """Cells by the first of their line, of a table that begins so."""
  after = text(document).split(f'\n{begin}')[1 + number]
  lines = after.split('\n\n')[0].splitlines()[2:]
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
  return {plain(name): others for name, *others in cells}


def lines_of(document, begin, names, number=0):
  """(name, cells) for names, all of which the table has, and no others."""
  found = table(document, begin, number)
  by_name = {plain(name): name for name in names}
  assert found.keys() == by_name.keys()
  return [(by_name[name], cells) for name, cells in found.items()]


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_commands(file):
  """The notes say how every file was made."""
  _, _, command = figures(file.stem)['command'].partition('benchmarks.')
  module, _, flags = command.partition(' ')
  notes = ' '.join(text(NOTES).split())
  assert f'experiments.benchmarks.{module}' in notes
  assert flags in notes
  assert f'{file.name}`' in notes or f'{file.name} ' in notes


def both(method, field):
  """Theirs and ours, None where there is none."""
  return [
    row('mergekit', method=method, tool=tool).get(field)
    for tool in ('mergekit', 'mergekit_jax')
  ]


METHODS = {'average', 'task_arithmetic', 'ties tensor', 'dare_ties'}


class TestMergekit:
  def test_readme(self):
    names = lines_of('README.md', '| | mergekit | mergekit_jax |', METHODS)
    for name, (theirs, ours, memory, outside) in names:
      same(f'{theirs} {ours}', *both(name, 'command_seconds'))
      same(memory, *both(name, 'peak_mib'))
      same(outside, *both(name, 'outside'))

  def test_notes(self):
    for name, cells in lines_of(NOTES, '| | mergekit s |', METHODS):
      theirs, ours, faster, _, cpu, memory, outside = cells
      seconds = both(name, 'command_seconds')
      same(f'{theirs} {ours}', *seconds)
      same(faster, seconds[0] / seconds[1])
      same(cpu, *both(name, 'cpu_seconds'))
      same(memory, *both(name, 'peak_mib'))
      same(outside, *both(name, 'outside'))

  @pytest.mark.parametrize('document', ['README.md', NOTES])
  def test_size(self, document):
    says(
      document, r'(\d+)M parameters in', figures('mergekit')['parameters'] / 1e6
    )

  def test_start_up(self):
    theirs, ours = zip(
      *(both(m, 'start_up_seconds') for m in METHODS), strict=True
    )
    says_range(NOTES, r'Of ours (.{3,10}) s is start-up', ours)
    says_range(NOTES, r's is start-up, of theirs (.{3,10}) \(what', theirs)

  def test_ratios_of_ties(self):
    cpu, memory = (both('ties tensor', f) for f in ('cpu_seconds', 'peak_mib'))
    says(NOTES, r'TIES \(in CPU seconds (\S+) of 8\)', cpu[0] / cpu[1])
    says(NOTES, r'\((\S+) of theirs for TIES\)', memory[1] / memory[0])

  def test_a_larger_model(self):
    fields = ('command_seconds', 'start_up_seconds', 'cpu_seconds', 'peak_mib')
    theirs, ours = (
      # [fields, methods]
      np.array(
        [
          [row('mergekit_1gb', method=m, tool=tool)[field] for m in methods]
          for field in fields
        ]
      )
      for methods in [('average', 'task_arithmetic')]
      for tool in ('mergekit', 'mergekit_jax')
    )
    ratios = theirs / ours
    two = r'(\S+) and (\S+)'
    says(
      NOTES,
      rf'they take {two} s, ours {two}: {two} times faster, where',
      *(*theirs[0], *ours[0], *ratios[0]),
    )
    says(
      NOTES,
      rf'without start-up \(theirs {two}, ours {two}\) {two} against {two} s',
      *(*theirs[1], *ours[1], *(theirs[0] - theirs[1]), *(ours[0] - ours[1])),
    )
    says(
      NOTES,
      rf'CPU seconds are {two} times less, memory {two} MiB against {two}\.',
      *(*ratios[2], *ours[3], *theirs[3]),
    )


def floors(sources, methods, field):
  return [
    row('floor', sources=sources, method=method)[field] for method in methods
  ]


class TestFloor:
  @pytest.mark.parametrize(
    'number,sources', [(0, 'uncompressed'), (1, 'compressed')]
  )
  def test_tables(self, number, sources):
    fields = (
      *('floor_seconds', 'merge_seconds', 'compile_seconds'),
      *('times_floor', 'cpu_seconds', 'peak_mib'),
    )
    names = (*ONE_READ, *TIES)
    for name, cells in lines_of(NOTES, '| | floor s |', names, number):
      found = row('floor', sources=sources, method=name)
      same(' '.join(cells), *(found[field] for field in fields))

  @pytest.mark.parametrize(
    'sources,sentence',
    [
      (
        'uncompressed',
        r'uncompressed sources takes {} times as long .* TIES {} times; of ',
      ),
      (
        'compressed',
        r'; of compressed ones, .* by default, {} times, TIES {} \(',
      ),
    ],
  )
  def test_readme(self, sources, sentence):
    one, other = (r'(\S+ to \S+)', r'\S+ to \S+')
    for methods, blanks in ((ONE_READ, (one, other)), (TIES, (other, one))):
      times = floors(sources, methods, 'times_floor')
      says_range('README.md', sentence.format(*blanks), times)

  def test_rates(self):
    """Bytes read and written in a second of the merge, by each of two cores."""
    pair = r'{} GB/s a core, TIES {}, compressed sources {} and TIES {}:'
    blanks = [r'\S+ to \S+'] * 4
    cases = [
      (sources, methods)
      for sources in ('uncompressed', 'compressed')
      for methods in (ONE_READ, TIES)
    ]
    for number, (sources, methods) in enumerate(cases):
      moved, took, floor = (
        np.array(floors(sources, methods, field))
        for field in ('floor_gb_per_second', 'merge_seconds', 'floor_seconds')
      )
      own = [*blanks[:number], r'(\S+ to \S+)', *blanks[number + 1 :]]
      says_range('README.md', pair.format(*own), moved * floor / took / 2)

  def test_notes(self):
    rates = floors(
      'uncompressed', (*ONE_READ, 'ties tensor'), 'floor_gb_per_second'
    )
    three = row('floor', sources='uncompressed', method='ties model')
    says_range(NOTES, r'cache, at (\S+ to \S+) GB/s with the write', rates)
    says(
      NOTES,
      r'\((\S+) where each byte is read three times',
      three['floor_gb_per_second'],
    )
    says_range(
      NOTES,
      r'Start-up \(([^)]*) s\) is not counted',
      [row['start_up_seconds'] for row in rows('floor')],
    )


class TestScaling:
  def test_table(self):
    cases = ('gigabytes', 'experts', 'devices', 'processes')
    measured = ('gigabytes_read', 'merge_seconds', 'peak_mib')
    after = text(NOTES).split('\n| GB a model |')[1].split('\n\n')[0]
    lines = after.splitlines()[2:]
    found = {
      tuple(row[case] for case in cases): row
      for row in rows('scaling', method='task_arithmetic')
    }
    assert len(lines) == len(found)
    for line in lines:
      cells = [cell.strip() for cell in line.split('|')[1:-1]]
      case = found[tuple(map(float, cells[:4]))]
      same(' '.join(cells[4:]), *(case[name] for name in measured))

  def test_memory_of_all_sizes(self):
    shape = {'experts': 4, 'devices': 2, 'processes': 1}
    of = rows('scaling', method='task_arithmetic', **shape)
    memory = [row['peak_mib'] for row in of]
    says_range(NOTES, r'met: (\S+ to \S+) MiB, \d+ % around', memory)
    says(NOTES, r'MiB, (\d+) % around their middle', around_middle(memory))

  def test_eight_experts(self):
    growth = figures('scaling')['eight_experts_to_two']['task_arithmetic']
    says(
      NOTES,
      r'two read (\S+) times the bytes in (\S+) times the time and take (\S+) '
      r'times the memory',
      growth['gigabytes_read'],
      growth['merge_seconds'],
      growth['peak_mib'],
    )


def test_memory():
  begin = '| model | average |'
  columns = text(NOTES).split(f'\n{begin}')[1].splitlines()[0].split('|')
  columns = ['average', *(name.strip() for name in columns[:-1])]
  for size, cells in table(NOTES, begin).items():
    found = [
      row('memory', gigabytes=float(size.removesuffix('gb')), method=name)
      for name in columns
    ]
    same(' '.join(cells), *(row['peak_mib'] for row in found))
  assert len(rows('memory')) == len(columns) * len(table(NOTES, begin))
  spread = [
    around_middle([row['peak_mib'] for row in rows('memory', method=name)])
    for name in columns
  ]
  says(NOTES, r'middle, hold \((\d+) % at most\)', max(spread))


def test_start_up():
  begin = '| | cold s | warm s | CPU s, cold / warm | programs |'
  found = {f'{r["method"]}, {r["sources"]}': r for r in rows('start_up')}
  fields = ('cold_seconds', 'warm_seconds', 'cold_cpu_seconds')
  fields = (*fields, 'warm_cpu_seconds', 'programs')
  for name, cells in lines_of(NOTES, begin, found):
    same(' '.join(cells), *(found[name][field] for field in fields))
    assert found[name]['programs_added'] == 0


class TestMany:
  FIELDS = (
    *('merges', 'together_seconds', 'apart_seconds', 'times_faster'),
    *('together_gb', 'apart_gb', 'together_peak_mib', 'apart_peak_mib'),
  )

  def test_table(self):
    begin = '| | merges | together s | apart s |'
    found = {r['sweep']: r for r in rows('many')}
    for name, cells in lines_of(NOTES, begin, found):
      same(' '.join(cells), *(found[name][field] for field in self.FIELDS))

  def test_readme(self):
    says(
      'README.md',
      r'four scales of task arithmetic (\S+) times faster than one after the '
      r'other, four of TIES (\S+) times, four methods (\S+) times',
      *(row['times_faster'] for row in rows('many')),
    )

  def test_notes(self):
    ties = row('many', sweep='ties model, 4 scales')
    share = ties['together_seconds'] / ties['apart_seconds']
    says(NOTES, r'four scales of TIES take (\S+) of the time of four', share)


def test_planning():
  says(
    NOTES,
    r'(\S+) CPU s to be planned and described if they are alike, (\S+) if no '
    r'two are, (\S+) if they are also large, and (\S+) as three files',
    *(row['cpu_seconds'] for row in rows('planning')),
  )


def test_accuracy():
  """Every element of every method is judged."""
  ours = [row('mergekit', tool='mergekit_jax', method=m) for m in METHODS]
  (elements,) = {row['elements'] for row in ours}
  assert {row['outside'] for row in ours} == {0}
  at_an_edge = sum(row['at_an_edge'] for row in ours)
  assert at_an_edge <= 1e-5 * elements
  says(
    NOTES,
    r'of (\S+) elements of ours (\S+) are at an edge by all four methods '
    r'together',
    *(elements, at_an_edge),
  )
  theirs = row('mergekit', tool='mergekit', method='ties tensor')
  says(
    NOTES,
    r"Of mergekit's TIES (\S+) more are right only by its choice",
    theirs['at_an_edge'],
  )


def test_kernels():
  begin = '| | average | task_arithmetic | ties tensor |'
  found = table(NOTES, begin)
  works = [row['work'] for row in rows('kernels')]
  header = text(NOTES).split(f'\n{begin}')[1].splitlines()[0]
  assert [name.strip() for name in header.split('|')[:-1]] == works[3:]
  for line, field in (('measured', 'measured_ns'), ('ofthebytestime', 'ratio')):
    same(' '.join(found[line]), *(row[field] for row in rows('kernels')))
  says(
    NOTES,
    r'copy bandwidth of (\S+) GB/s',
    figures('kernels')['copy_gb_per_second'],
  )
  says(
    NOTES,
    r'little else: (\S+), (\S+) and (\S+) ns',
    *(
      row('kernels', work=n)['measured_ns']
      for n in ('masks', 'dare_ties', 'dare')
    ),
  )


def test_faults():
  found = figures('faults')
  says(
    NOTES,
    r'(\d+) kills, (\d+) differences, (\d+) units redone that the journal '
    r'held, (\d+) partial outputs visible, (\d+) survivors',
    *(found[name] for name in ('kills', 'differences', 'units_redone')),
    *(found['partial_outputs_visible'], found['survivors_late_or_silent']),
  )
  says(NOTES, r'–(\S+) s where another did', found['seconds_of_survivors'])
