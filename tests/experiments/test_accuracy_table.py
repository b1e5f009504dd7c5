"""Accuracies with sampling errors, from a few merges made up."""

import dataclasses
import pathlib
import shutil

import pytest

from experiments.scale_study.analysis.cells import Cell
from experiments.tools import accuracy_table
from tests.experiments import made_up_grid


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


def test_only_what_no_merge_covers_is_missing():
  rows = _rows(accuracy_table.table([MERGES[0], MERGES[2]], 100))
  assert rows['average, N = 1'] == [
    *('–', '0.64 ± 0.05', '–'),
    *('0.36 ± 0.05', '0.36 ± 0.05'),
  ]


def test_datasets_of_a_category_are_averaged_first():
  tasks = ('sentiment/films', 'sentiment/plays', 'topic/news')
  scores = dict(zip(tasks, (0.6, 0.8, 0.5), strict=True))
  cell = dataclasses.replace(
    MERGES[0],
    held_in=tasks,
    held_out=(),
    **dict.fromkeys(('scores', 'expert', 'base_scores', 'multitask'), scores),
  )
  text = accuracy_table.table([cell], 100)
  assert '| sentiment | topic | **held-in** | **held-out** |' in text
  # √(0.6 · 0.4 + 0.8 · 0.2) / 20, and half of its hypotenuse with 0.05.
  assert _rows(text)['average, N = 2'] == [
    *('0.70 ± 0.03', '0.50 ± 0.05', '0.60 ± 0.03', '–'),
  ]


def test_nothing_is_said_of_an_error_over_unknown_questions():
  """5 of 6 cannot be of 100 questions."""
  cell = _cell(0, ('sentiment', 'topic'), (5 / 6, 0.8, 0.5))
  rows = _rows(accuracy_table.table([cell], 100))
  assert rows['average, N = 2'] == [
    *('0.83', '0.80 ± 0.04', '0.82'),
    *('0.50 ± 0.05', '0.50 ± 0.05'),
  ]


def test_several_sizes_are_refused():
  other = dataclasses.replace(MERGES[0], size='m')
  with pytest.raises(ValueError, match='one size and base, but .* of m/instr'):
    accuracy_table.table([*MERGES, other], 100)
  with pytest.raises(ValueError, match='of none'):
    accuracy_table.table(MERGES[-1:], 100)


def test_a_folder_without_a_study_is_named(tmp_path):
  said = accuracy_table.main(['', str(tmp_path / 'nowhere')])
  assert said == (
    f'{tmp_path}/nowhere/cells.jsonl is missing: give the folder of a study.'
  )


def test_the_published_table_is_what_is_made_of_its_cells(tmp_path):
  published = pathlib.Path(__file__).parents[2] / 'experiments/results/smollm2'
  for name in ('cells.jsonl', 'config.json', 'gates.json'):
    shutil.copy(published / name, tmp_path)
  assert accuracy_table.main(['', str(tmp_path)]) is None
  table = pathlib.Path('tables', 'accuracies.md')
  assert (tmp_path / table).read_text() == (published / table).read_text()


def test_both_bases_are_refused_by_name(tmp_path):
  both = [MERGES[0], dataclasses.replace(MERGES[0], base='pretrained')]
  for cell in both:
    made_up_grid.append(
      tmp_path / 'cells.jsonl',
      dataclasses.replace(
        cell,
        checkpoints={'base': '', 'experts': dict.fromkeys(cell.subset, '')},
      ),
    )
  (tmp_path / 'config.json').write_text('{"test_examples": 100}')
  (tmp_path / 'gates.json').write_text('[]')
  said = accuracy_table.main(['', str(tmp_path)])
  assert said and 's/instruction-tuned, s/pretrained. Take a study' in said
