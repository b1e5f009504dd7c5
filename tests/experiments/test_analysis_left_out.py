"""Findings without one of their categories, on grids with known answers."""

import dataclasses

import pytest

from experiments.scale_study.analysis import left_out, verdicts
from tests.experiments import made_up_grid
from tests.experiments.made_up_grid import HELD_IN, HELD_OUT, Truth


def better_in(study, category, factor):
  """The study with one category better from the instruction-tuned base."""

  def changed(cell):
    if cell.base != 'instruction-tuned':
      return cell
    scores = {
      task: score * (factor if task == category else 1)
      for task, score in cell.scores.items()
    }
    return dataclasses.replace(cell, scores=scores)

  return dataclasses.replace(study, cells=tuple(map(changed, study.cells)))


def rows_of(study, finding):
  return {r.category: r for r in left_out.each(study) if r.finding == finding}


def test_without_any_category_an_effect_of_all_is_the_same():
  study = made_up_grid.study(Truth(quality=0.1))
  rows = rows_of(study, '1')
  assert [*rows] == sorted(HELD_IN)
  for row in rows.values():
    assert row.effect == pytest.approx(0.1)
    assert row.verdict == 'supported' and not row.differs


def test_an_effect_of_one_category_is_gone_without_it():
  name = HELD_IN[3]
  same = Truth(quality=0.0, noise=0.0)
  study = better_in(made_up_grid.study(same), name, 1.5)
  judged = {v.finding: v for v in verdicts.judge_all(study) if v.is_main}
  assert judged['1'].verdict == 'supported'
  for category, row in rows_of(study, '1').items():
    assert row.differs == (category == name)
    assert row.verdict == ('not supported' if row.differs else 'supported')
    if row.differs:
      assert row.effect == pytest.approx(0, abs=1e-9)
    else:
      # One of seven categories instead of one of eight.
      assert row.effect == pytest.approx(judged['1'].effect * 8 / 7)


def test_findings_on_held_out_lose_categories_that_are_held_out():
  study = made_up_grid.study(Truth())
  assert [*rows_of(study, '3a')] == sorted(HELD_OUT)
  assert [*rows_of(study, '4')] == sorted(HELD_IN)


def test_what_cannot_be_tested_has_no_rows():
  study = made_up_grid.study(Truth(), sizes={'s': 100_000})
  assert not rows_of(study, '2') and rows_of(study, '1')
