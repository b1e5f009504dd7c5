"""Which sanity checks the committed results pass, of those that were asked."""

import collections
import csv
import functools
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'experiments' / 'results'
# Of 8 and 4: how many categories have to pass in the smallest models.
ASKED = {'held-in': 6, 'held-out': 3}


@functools.cache
def gates_of(preset):
  return json.loads((RESULTS / preset / 'gates.json').read_text())


def failed(preset, *sizes):
  """What failed any gate: size, base, category and seed."""
  return {
    (gate['size'], gate['base'], gate['category'], gate['seed'])
    for gate in gates_of(preset)
    if not gate['pass'] and gate['size'] in sizes
  }


@pytest.mark.parametrize('preset', ['cpu', 'full'])
def test_the_notes_say_how_many_pass(preset):
  gates = gates_of(preset)
  passed = sum(gate['pass'] for gate in gates)
  notes = (ROOT / 'BUILD_NOTES.md').read_text(encoding='utf-8')
  assert f'- Gates: {passed} of {len(gates)} pass' in notes


@pytest.mark.parametrize('preset', ['cpu', 'full'])
def test_enough_categories_pass_in_the_smallest_models(preset):
  passed = collections.defaultdict(lambda: collections.defaultdict(list))
  for gate in gates_of(preset):
    if gate['size'] == 's' and gate['category'] != 'all':
      arm = gate['base'], gate['seed'], gate['split']
      passed[arm][gate['category']].append(gate['pass'])
  assert len(passed) == 2 * 2 * (6 if preset == 'cpu' else 3)
  for (_, _, split), categories in passed.items():
    assert len(categories) == (8 if split == 'held-in' else 4)
    assert sum(map(all, categories.values())) >= ASKED[split]


def test_at_372k_and_above_all_pass_but_what_the_notes_name():
  """Asked for was all of them: at 372k three arms miss one or two."""
  assert failed('full', 'l', 'xl') == set()
  assert failed('full', 'm') == {
    ('m', 'pretrained', 'paraphrase_identification', 1),
    ('m', 'pretrained', 'natural_language_inference', 1),
    ('m', 'instruction-tuned', 'sentiment', 0),
  }


def test_the_instruction_tuned_base_is_better():
  """But for held-out in two seeds of the smallest models of `cpu`."""
  asked = {
    (preset, gate['size'], gate['split'], gate['seed']): gate['pass']
    for preset in ('cpu', 'full')
    for gate in gates_of(preset)
    if gate['category'] == 'all'
  }
  assert len(asked) == 2 * (2 * 6 + 4 * 3)
  assert [arm for arm, better in asked.items() if not better] == [
    ('cpu', 's', 'held-out', 2),
    ('cpu', 's', 'held-out', 4),
  ]


def test_held_out_has_intervals_in_cpu():
  """Of every mean of merges over six seeds, for both bases."""
  with (RESULTS / 'cpu' / 'tables' / 'merges.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert {(row['base'], row['n']) for row in rows} >= {
    (base, n)
    for base in ('pretrained', 'instruction-tuned')
    for n in ('2', '4', '6', '8')
  }
  for row in rows:
    if row['n'] != '1':
      low, mean, high = (
        float(row[name])
        for name in ('held_out_low', 'held_out', 'held_out_high')
      )
      assert low < mean < high
