"""Tables of raw scores, of a study whose scores are known."""

import dataclasses

import numpy as np
import pytest

from experiments.scale_study.analysis import scores
from tests.experiments import made_up_grid
from tests.experiments.made_up_grid import HELD_IN, HELD_OUT, Truth


@pytest.fixture(scope='module')
def study():
  return made_up_grid.study(
    sizes={'s': 100, 'm': 200},
    bases=('instruction-tuned',),
    methods=('average', 'ties'),
    ns=(2, 8),
    settings=('validated', 'fixed'),
  )


def test_scores_are_those_of_the_models(study):
  small, large = scores.tables(study)
  assert (small.size, large.size) == ('s', 'm') and small.n == (2, 8)
  assert (small.held_in, small.held_out) == (HELD_IN, HELD_OUT)
  assert small.columns[:4] == ('chance', 'base', 'expert', 'multitask')
  assert small.columns[4:] == ('average', 'ties')
  expert = 0.8 + 0.02 * np.arange(8)
  for k, n in enumerate(small.n):
    kept = [
      Truth().held_in('instruction-tuned', method, n, doublings=1)
      for method in ('average', 'ties')
    ]
    expected = [0 * expert + 0.25, expert / 2, expert, 0.95 * expert]
    expected += [part * expert for part in kept]
    np.testing.assert_allclose(large.values[k, :8].T, expected)
    np.testing.assert_allclose(
      large.held_in_means()[k], np.mean(expected, axis=1)
    )
  # No expert was trained on these.
  np.testing.assert_allclose(
    large.values[:, 8:],
    np.broadcast_to([0.5, 0.6, np.nan, 0.63, 0.66, 0.66], (2, 4, 6)),
  )


def test_a_category_is_scored_where_its_expert_is_merged(study):
  """What merges score on tasks of other experts is not in the table."""
  spoiled = [
    dataclasses.replace(
      cell,
      scores=dict(cell.scores)
      | {name: 9.0 for name in HELD_IN if name not in cell.subset}
      | {f'{HELD_IN[0]} (ROUGE-L)': 9.0},
    )
    for cell in study.cells
  ]
  tables = scores.tables(dataclasses.replace(study, cells=tuple(spoiled)))
  for table, expected in zip(tables, scores.tables(study), strict=True):
    np.testing.assert_array_equal(table.values, expected.values)


def test_chance_is_of_the_categories_that_were_merged(study):
  """With one subset of two, the others are in no mean of N = 2."""
  chosen = [c for c in study.cells if c.n == 8 or c.subset_number == 0]
  chance = {name: i / 10 for i, name in enumerate(HELD_IN)}
  gates = [
    dataclasses.replace(gate, chance=chance.get(gate.category, 0.5))
    for gate in study.gates
  ]
  table, _ = scores.tables(
    dataclasses.replace(study, cells=tuple(chosen), gates=tuple(gates))
  )
  merged = {name for cell in chosen if cell.n == 2 for name in cell.subset}
  assert len(merged) < len(HELD_IN)
  two, eight = table.held_in_means()[:, 0]
  assert two == pytest.approx(np.mean([chance[name] for name in merged]))
  assert eight == pytest.approx(np.mean([*chance.values()]))


def test_what_some_models_lack_is_the_mean_of_the_others(study):
  """A seed whose multitask model is not scored yet."""
  under_way = [
    dataclasses.replace(cell, multitask={}) if cell.seed == 0 else cell
    for cell in study.cells
  ]
  tables = scores.tables(dataclasses.replace(study, cells=tuple(under_way)))
  for table, expected in zip(tables, scores.tables(study), strict=True):
    np.testing.assert_allclose(table.values, expected.values)


def test_a_terminal_shows_them(study):
  small, _ = scores.text(scores.tables(study)).split('\n\n')
  header, first, *_, two, eight = small.splitlines()
  assert header.startswith('s, instruction-tuned, N = 8')
  # Held-in at the smallest size: 0.8 at N = 2 less 0.16, ∓ half of 0.08.
  assert first.split() == [
    *('multiple_choice_qa', '0.250', '0.400', '0.800', '0.760'),
    *(f'{0.8 * kept:.3f}' for kept in (0.6, 0.68)),
  ]
  assert two.startswith('mean held-in, N = 2')
  assert eight.startswith('mean held-in, N = 8')
  assert len({len(line) for line in small.splitlines()}) == 1
