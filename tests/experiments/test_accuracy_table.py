"""Accuracies with sampling errors, from a few merges made up."""

import dataclasses

import pytest

from experiments.scale_study.analysis.cells import Cell
from experiments.tools import accuracy_table


def _cell(seed, subset, scores, **changes):
  fields = dict(
    size='s',
    parameters=1,
    base='instruction-tuned',
    method='average',
    n=len(subset),
    subset=subset,
    subset_number=0,
    seed=seed,
    setting='validated',
    hyperparameters={},
    checkpoints={},
    command='',
    drift=0.1,
    loss=1.0,
    scores={'sentiment': scores[0], 'topic': scores[1], 'nli': scores[2]},
    expert={'sentiment': 0.9, 'topic': 0.8},
    base_scores={'sentiment': 0.5, 'topic': 0.2, 'nli': 0.5},
    multitask={'sentiment': 0.8, 'topic': 0.8, 'nli': 0.6},
    held_in=('sentiment', 'topic'),
    held_out=('nli',),
  )
  return Cell(**{**fields, **changes})


MERGES = [
  _cell(0, ('sentiment', 'topic'), (0.5, 0.8, 0.5)),
  _cell(1, ('sentiment', 'topic'), (0.9, 0.8, 0.7)),
  # What counts of one expert is its own task, and what none was trained on.
  _cell(0, ('topic',), (0.0, 0.64, 0.36)),
  _cell(0, ('sentiment',), (0.36, 0.0, 0.36)),
  _cell(0, ('topic',), (1, 1, 1), setting='fixed'),
]


def _rows(text):
  rows = [line.strip('|\n').split(' | ') for line in text.splitlines()]
  return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_means_and_errors():
  rows = _rows(accuracy_table.table(MERGES, 100))
  # √(0.7 · 0.3 / 100), √(0.8 · 0.2 / 100); half of their hypotenuse.
  assert rows['average, N = 2'] == [
    *('0.70 ± 0.05', '0.80 ± 0.04', '0.75 ± 0.03'),
    *('0.60 ± 0.05', '0.60 ± 0.05'),
  ]
  assert rows['average, N = 1'] == [
    *('0.36 ± 0.05', '0.64 ± 0.05', '0.50 ± 0.03'),
    *('0.36 ± 0.05', '0.36 ± 0.05'),
  ]
  assert rows['experts'] == [
    *('0.90 ± 0.03', '0.80 ± 0.04', '0.85 ± 0.03'),
    *('–', '–'),
  ]


def test_what_is_not_testable_is_in_no_mean():
  text = accuracy_table.table(MERGES, 100, ['topic', 'nli'])
  assert ' topic (not testable) | **held-in** | nli (not testable) |' in text
  rows = _rows(text)
  assert rows['average, N = 2'] == [
    *('0.70 ± 0.05', '0.80 ± 0.04', '0.70 ± 0.05'),
    *('0.60 ± 0.05', '–'),
  ]


def test_a_method_that_was_not_run_has_no_row():
  rows = _rows(accuracy_table.table(MERGES, 100))
  assert 'ties, N = 2' not in rows


def test_several_sizes_are_refused():
  other = dataclasses.replace(MERGES[0], size='m')
  with pytest.raises(ValueError, match='one size and base'):
    accuracy_table.table([*MERGES, other], 100)
