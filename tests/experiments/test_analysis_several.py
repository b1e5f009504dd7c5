"""Several findings at once, against arithmetic done by hand."""

import dataclasses
import math

import numpy as np
import pytest

from experiments.scale_study.analysis import several, verdicts
from tests.experiments import made_up_grid
from tests.experiments.made_up_grid import Truth


def test_holm_multiplies_the_smallest_by_the_most():
  # 3 · 0.01; 2 · 0.03, and what comes after is no smaller.
  assert several.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
  assert several.holm([0.6, 0.7]) == [1, 1]
  assert several.holm([]) == []


def _tail(t):
  """Student's upper tail for two degrees of freedom, which has a formula."""
  return 0.5 * (1 - t / math.sqrt(2 + t**2))


def test_the_verdicts_themselves_are_corrected():
  judged = verdicts.judge_all(made_up_grid.study(Truth(noise=0.02)))
  found = several.corrected(judged)
  assert [row.finding for row in found] == ['1', '2', '3a', '3b', '4', '5']
  tails = []
  for row in found:
    (verdict,) = (v for v in judged if v.is_main and v.finding == row.finding)
    effects = np.array(verdict.by_seed)
    t = effects.mean() / (effects.std(ddof=1) / math.sqrt(3))
    tails.append(_tail(t))
    assert row.alone == pytest.approx(tails[-1], rel=1e-6)
  assert [row.one_sided for row in found] == pytest.approx(several.holm(tails))
  both = [2 * min(tail, 1 - tail) for tail in tails]
  assert [row.two_sided for row in found] == pytest.approx(several.holm(both))


def test_what_has_too_few_seeds_is_not_counted():
  judged = verdicts.judge_all(made_up_grid.study(Truth(noise=0.02)))
  few = [
    dataclasses.replace(v, by_seed=v.by_seed[:2]) if v.finding != '2' else v
    for v in judged
  ]
  (row,) = several.corrected(few)
  assert row.finding == '2' and row.one_sided == row.alone
