"""Accuracies with sampling errors, from a few merges made up."""

import dataclasses

from experiments.scale_study.analysis import accuracies
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.cells import Cell, Gate

QUESTIONS = {'sentiment': 100, 'topic': 100, 'nli': 25}


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


MERGES = (
  _cell(0, ('sentiment', 'topic'), (0.5, 0.8, 0.5)),
  _cell(1, ('sentiment', 'topic'), (0.9, 0.8, 0.7)),
  # What counts of an expert is its own task, and what none was trained on.
  _cell(0, ('topic', 'others'), (0.0, 0.64, 0.36), method='ties'),
  _cell(0, ('sentiment', 'others'), (0.36, 0.0, 0.36), method='ties'),
  _cell(0, ('topic', 'others'), (1, 1, 1), method='ties', setting='fixed'),
)


def _rows(merges=MERGES, questions=None, failed=()):
  """The cells of the table by row."""
  text = _text(merges, QUESTIONS if questions is None else questions, failed)
  rows = [line.strip('|\n').split(' | ') for line in text.splitlines()]
  return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def _text(merges, questions, failed=()):
  gates = tuple(
    Gate(
      size=cell.size,
      base=cell.base,
      category=name,
      split='held-out' if name == 'nli' else 'held-in',
      score=0.5,
      chance=0.2,
      passed=name not in failed,
      gate='',
      seed=0,
    )
    for cell in merges
    for name in QUESTIONS
  )
  return accuracies.text(Results(tuple(merges), gates), questions)


def test_means_and_errors():
  rows = _rows()
  # √(0.7 · 0.3 / 100), √(0.8 · 0.2 / 100); half of their hypotenuse; and
  # √(0.6 · 0.4 / 25).
  assert rows['average, N = 2'] == [
    *('0.70 ± 0.05', '0.80 ± 0.04', '0.75 ± 0.03'),
    *('0.60 ± 0.10', '0.60 ± 0.10'),
  ]
  assert rows['ties, N = 2'] == [
    *('0.36 ± 0.05', '0.64 ± 0.05', '0.50 ± 0.03'),
    *('0.36 ± 0.10', '0.36 ± 0.10'),
  ]
  assert rows['experts'] == [
    *('0.90 ± 0.03', '0.80 ± 0.04', '0.85 ± 0.03'),
    *('–', '–'),
  ]


def test_what_is_not_testable_is_in_no_mean():
  text = _text(MERGES, QUESTIONS, ('topic', 'nli'))
  assert ' topic (not testable) | **held-in** | nli (not testable) |' in text
  assert _rows(failed=('topic', 'nli'))['average, N = 2'] == [
    *('0.70 ± 0.05', '0.80 ± 0.04', '0.70 ± 0.05'),
    *('0.60 ± 0.10', '–'),
  ]


def test_a_method_that_was_not_run_has_no_row():
  assert 'dare_ties, N = 2' not in _rows()


def test_only_what_no_merge_covers_is_missing():
  assert _rows([MERGES[0], MERGES[2]])['ties, N = 2'] == [
    *('–', '0.64 ± 0.05', '–'),
    *('0.36 ± 0.10', '0.36 ± 0.10'),
  ]


def test_datasets_of_a_category_are_averaged_first():
  tasks = ('sentiment/films', 'sentiment/plays', 'topic/news')
  scores = dict(zip(tasks, (0.6, 0.8, 0.5), strict=True))
  cell = dataclasses.replace(
    MERGES[0],
    held_in=tasks,
    held_out=(),
    base_scores=dict.fromkeys(tasks, 0.1),
    **dict.fromkeys(('scores', 'expert', 'multitask'), scores),
  )
  questions = dict.fromkeys(tasks, 100)
  assert '| sentiment | topic | **held-in** | **held-out** |' in _text(
    [cell], questions
  )
  # √(0.6 · 0.4 + 0.8 · 0.2) / 20, and half of its hypotenuse with 0.05.
  assert _rows([cell], questions)['average, N = 2'] == [
    *('0.70 ± 0.03', '0.50 ± 0.05', '0.60 ± 0.03', '–'),
  ]


def test_nothing_is_said_of_an_error_over_unknown_questions():
  rows = _rows(questions={'topic': 100, 'nli': 25})
  assert rows['average, N = 2'] == [
    *('0.70', '0.80 ± 0.04', '0.75'),
    *('0.60 ± 0.10', '0.60 ± 0.10'),
  ]


def test_each_size_and_base_has_a_table():
  other = dataclasses.replace(MERGES[0], size='m', parameters=2)
  text = _text([*MERGES, other], QUESTIONS)
  assert '### s, instruction-tuned base\n\n| | sentiment' in text
  assert '### m, instruction-tuned base\n\n| | sentiment' in text
  assert '###' not in _text(MERGES, QUESTIONS)
