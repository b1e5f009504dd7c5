"""Ratios, means and intervals, against arithmetic done by hand."""

import dataclasses
import math

import numpy as np
import pytest

from experiments.scale_study.analysis import bootstrap, measures
from experiments.scale_study.analysis.aggregate import BASE, Results, SIZE
from experiments.scale_study.analysis.cells import Cell, Gate
from experiments.scale_study.analysis.sweeps import sweep_points

_CELL = Cell(
  size='s',
  parameters=100,
  base='pretrained',
  method='ties',
  n=2,
  subset=('topic', 'sentiment'),
  subset_number=0,
  seed=0,
  setting='validated',
  hyperparameters={'scale': 1.0},
  checkpoints={'base': 'b', 'experts': {'topic': 't', 'sentiment': 's'}},
  command='',
  drift=0.1,
  loss=1.5,
  losses={'topic/a': 1, 'topic/b': 2, 'sentiment': 1.5, 'paraphrase': 5.5},
  scores={
    'topic/a': 0.6,
    'topic/b': 0.4,
    'sentiment': 0.6,
    'paraphrase': 0.1,
    'inference/a': 0.6,
    'inference/b': 0.5,
    'completion': 0.6,
  },
  expert={'topic/a': 1.0, 'topic/b': 0.6, 'sentiment': 0.8},
  base_scores={
    'topic/a': 0.4,
    'topic/b': 0.2,
    'sentiment': 0.5,
    'paraphrase': 0.5,
    'inference/a': 0.4,
    'inference/b': 0.5,
    'completion': 0.5,
  },
  multitask={
    'topic/a': 0.8,
    'topic/b': 0.6,
    'sentiment': 0.4,
    'paraphrase': 0.9,
    'inference/a': 0.5,
    'inference/b': 0.5,
    'completion': 0.75,
  },
  held_in=('topic/a', 'topic/b', 'sentiment', 'paraphrase'),
  held_out=('inference/a', 'inference/b', 'completion'),
)
_ALL = frozenset(
  ('topic', 'sentiment', 'paraphrase', 'inference', 'completion')
)


@pytest.mark.parametrize(
  ('measure', 'expected'),
  [
    # topic 0.5 / 0.8 = 5/8, sentiment 3/4; paraphrase is not merged.
    (measures.held_in, (5 / 8 + 3 / 4) / 2),
    # topic 0.3 / 0.8 = 3/8, sentiment 5/8.
    (measures.held_in_base, (3 / 8 + 5 / 8) / 2),
    # topic 0.7 / 0.8 = 7/8, sentiment 1/2.
    (measures.held_in_multitask, (7 / 8 + 1 / 2) / 2),
    # topic (0.5 − 0.3) / (0.8 − 0.3), sentiment (0.6 − 0.5) / (0.8 − 0.5).
    (measures.corrected, (0.4 + 1 / 3) / 2),
    # inference 0.55 / 0.45, completion 1.2.
    (measures.held_out, (11 / 9 + 1.2) / 2),
    # inference 0.5 / 0.45, completion 1.5.
    (measures.held_out_multitask, (10 / 9 + 1.5) / 2),
    (measures.over_multitask, (11 / 9 + 1.2) / 2 - (10 / 9 + 1.5) / 2),
    (measures.drift, 0.1),
    (measures.loss, 1.5),
    (measures.loss_of_all, 2.5),
  ],
)
def test_measures_average_within_categories_first(measure, expected):
  assert measure(_CELL, _ALL) == pytest.approx(expected, abs=1e-12)


def test_guessing_is_measured_like_a_merge():
  chance = {'topic': 0.2, 'sentiment': 0.5, 'completion': 0.5}
  held_in, held_out = measures.guessing(chance)
  assert held_in(_CELL, _ALL) == pytest.approx((0.25 + 0.625) / 2)
  # Of held-out, chance is known for completion alone.
  assert held_out(_CELL, _ALL) == pytest.approx(1)


def test_what_may_not_be_counted_is_left_out():
  countable = frozenset(('sentiment', 'inference'))
  assert measures.held_in(_CELL, countable) == pytest.approx(3 / 4)
  assert measures.held_out(_CELL, countable) == pytest.approx(11 / 9)
  assert math.isnan(measures.held_in(_CELL, frozenset(('paraphrase',))))


def test_without_a_multitask_model_its_measures_are_nan():
  cell = dataclasses.replace(_CELL, multitask={})
  assert math.isnan(measures.held_in_multitask(cell, _ALL))
  assert math.isnan(measures.over_multitask(cell, _ALL))


def _gate(category, passed=True, **changes):
  held_out = category in ('inference', 'completion')
  fields = {
    'size': 's',
    'base': 'pretrained',
    'category': category,
    'split': 'held-out' if held_out else 'held-in',
    'score': 0.5,
    'chance': 0.25,
    'passed': passed,
    'gate': 'direct training beats chance by 0.3',
    'seed': 0,
  }
  return Gate(**fields | changes)


def _reasons(*gates, cells=(_CELL,)):
  study = Results(cells, gates)
  return {e.category: e.reason for e in study.exclusions}


_GATES = tuple(map(_gate, sorted(_ALL)))


def test_every_category_needs_a_gate():
  assert _reasons(*_GATES) == {}
  assert _reasons(*_GATES[1:]) == {'completion': 'no gate was recorded'}


def test_one_failed_gate_of_many_excludes():
  failed = _gate('topic', False, gate='beats its base by 0.2', seed=2)
  assert _reasons(*_GATES, failed) == {
    'topic': 'failed: beats its base by 0.2 (score 0.50, seed 2)'
  }


def test_a_gate_of_another_size_or_base_does_not():
  others = (
    _gate('topic', False, size='m'),
    _gate('topic', False, base='instruction-tuned'),
  )
  assert _reasons(*_GATES, *others) == {}


def test_a_gate_of_all_categories_excludes_none():
  """Whether one base is the better one is asked where bases are compared."""
  failed = _gate('all', False, split='held-in', gate='IT beats PT')
  assert _reasons(*_GATES, failed) == {}
  better = Results((_CELL,), _GATES).is_better_base
  assert better('s')
  worse = Results((_CELL,), (*_GATES, failed)).is_better_base
  assert not worse('s') and worse('m')
  of_all = dataclasses.replace(failed, chance=None)
  chance = Results((_CELL,), (*_GATES, of_all)).chance()
  assert chance == dict.fromkeys(_ALL, 0.25)
  held_out = dataclasses.replace(failed, split='held-out')
  assert Results((_CELL,), (*_GATES, held_out)).is_better_base('s')


def test_validation_examples_exclude_none():
  """They are few, and there only to choose by."""
  expert = {**_CELL.expert, 'sentiment': 0.0}
  sweep = dataclasses.replace(
    _CELL, setting='sweep', split='validation', expert=expert
  )
  assert _reasons(*_GATES, cells=(_CELL, sweep)) == {}
  assert _reasons(
    *_GATES, cells=(_CELL, dataclasses.replace(sweep, split='test'))
  ) == {'sentiment': 'an expert has no gain to keep over its base'}


def test_a_ratio_needs_no_gate_but_something_to_divide_by():
  """In what is compared; validation and single experts exclude none."""
  arm = ('s', 'pretrained')
  assert Results((_CELL,), ()).with_ratio == {arm: _ALL}
  zero = dataclasses.replace(_CELL, expert={**_CELL.expert, 'sentiment': 0.0})
  assert Results((zero,), ()).with_ratio == {arm: _ALL - {'sentiment'}}
  for changes in (
    {'setting': 'sweep', 'split': 'validation'},
    {'n': 1, 'subset': ('sentiment',)},
  ):
    cells = (_CELL, dataclasses.replace(zero, **changes))
    assert Results(cells, ()).with_ratio == {arm: _ALL}
    assert _reasons(*_GATES, cells=cells) == {}


def test_a_data_set_that_was_not_learned_is_no_category_that_was_not():
  """One of two may score 0: what is divided by is the mean of both."""
  one = {**_CELL.expert, 'topic/b': 0.0}
  for expert, left in (
    (one, _ALL),
    ({**one, 'topic/a': 0.3}, _ALL - {'topic'}),
  ):
    cell = dataclasses.replace(_CELL, expert=expert)
    assert Results((cell,), _GATES).countable == {('s', 'pretrained'): left}
    assert Results((cell,), ()).with_ratio == {('s', 'pretrained'): _ALL}


def test_a_curve_leaves_out_what_its_own_examples_cannot_show():
  made = [
    dataclasses.replace(
      _CELL,
      setting='sweep',
      split='validation',
      hyperparameters={'scale': scale},
      scores={**_CELL.scores, 'topic/a': scale / 2, 'topic/b': scale / 2},
      expert={'topic/a': 0.5, 'topic/b': 0.5, 'sentiment': 0.0},
    )
    for scale in (0.4, 0.8)
  ]
  points = sweep_points(Results((_CELL, *made), _GATES))
  assert [(p.x, p.value) for p in points] == [(0.4, 0.4), (0.8, 0.8)]


def test_only_what_is_countable_everywhere_is_alike():
  arms = [('s', 'pretrained'), ('s', 'instruction-tuned'), ('m', 'pretrained')]
  merges = [
    dataclasses.replace(_CELL, size=size, base=base) for size, base in arms
  ]
  gates = [
    dataclasses.replace(gate, size=size, base=base)
    for size, base in arms
    for gate in _GATES
    # Each arm fails at another category.
    if gate.category != sorted(_ALL)[arms.index((size, base))]
  ]
  grid = Results(tuple(merges), tuple(gates)).grid()

  def missing(grid):
    found = [_ALL - grid.countable[arm] for arm in arms]
    return [{sorted(_ALL).index(name) for name in names} for names in found]

  assert missing(grid) == [{0}, {1}, {2}]
  assert missing(grid.alike(BASE)) == [{0, 1}, {0, 1}, {2}]
  assert missing(grid.alike(SIZE)) == [{0, 2}, {1}, {0, 2}]
  assert missing(grid.alike(SIZE, BASE)) == [{0, 1, 2}] * 3


def test_nothing_is_divided_by_nothing():
  expert = {**_CELL.expert, 'sentiment': 0.5}
  base = {**_CELL.base_scores, 'completion': 0.0}
  no_gain = dataclasses.replace(_CELL, expert=expert)
  no_base = dataclasses.replace(_CELL, base_scores=base)
  # Said once, however many merges there are.
  again = dataclasses.replace(no_gain, method='average')
  assert _reasons(*_GATES, cells=(no_gain, again)) == {
    'sentiment': 'an expert has no gain to keep over its base'
  }
  assert list(_reasons(*_GATES, cells=(no_base,))) == ['completion']


def _with_ratio(ratio, **changes):
  scores = {**_CELL.scores, 'sentiment': 0.8 * ratio}
  return dataclasses.replace(
    _CELL,
    subset=('sentiment', changes.pop('beside')),
    scores=scores,
    expert={**_CELL.expert, 'paraphrase': 0.9},
    **changes,
  )


def test_means_are_over_subsets_then_over_seeds():
  merges = (
    _with_ratio(0.2, seed=0, beside='topic'),
    _with_ratio(0.4, seed=0, beside='paraphrase', subset_number=1),
    _with_ratio(0.9, seed=1, beside='topic'),
  )
  # Only sentiment may be counted: seed 0 has two subsets, seed 1 has one.
  study = Results(merges, (_gate('sentiment'),))
  grid = study.grid()
  assert grid.values(measures.held_in)[:, :, 0, 0, 0, 0] == pytest.approx(
    np.array([[0.2, 0.4], [0.9, np.nan]]), nan_ok=True
  )
  means = (0.3 + 0.9) / 2
  assert grid.means(measures.held_in).item() == pytest.approx(means)
  assert grid.estimate(measures.held_in).value.item() == pytest.approx(means)


def test_subsets_are_matched_by_their_categories():
  merges = (
    _with_ratio(0.2, size='s', beside='topic', subset_number=0),
    _with_ratio(0.4, size='s', beside='paraphrase', subset_number=1),
    _with_ratio(0.5, size='m', beside='paraphrase', subset_number=0),
    _with_ratio(0.3, size='m', beside='topic', subset_number=1),
  )
  gates = (_gate('sentiment'), _gate('sentiment', size='m'))
  values = Results(merges, gates).grid().values(measures.held_in)
  small, large = values[0, :, :, 0, 0, 0].T
  assert large - small == pytest.approx([0.1, 0.1])


def test_methods_without_hyperparameters_are_of_every_setting():
  plain = dataclasses.replace(_CELL, method='average', hyperparameters={})
  fixed = dataclasses.replace(_CELL, setting='fixed')
  study = Results((plain, _CELL, fixed), _GATES)
  assert study.grid('fixed').methods == ('average', 'ties')
  assert {c.setting for c in study.grid().cells.values()} == {'validated'}
  # Where there is a merge of the setting itself, it is that one.
  both = (plain, dataclasses.replace(plain, setting='fixed'))
  for setting in ('validated', 'fixed'):
    for cells in (both, both[::-1]):
      (cell,) = Results(cells, _GATES).grid(setting).cells.values()
      assert cell.setting == setting


@pytest.mark.parametrize(
  ('seeds', 'subsets', 'of_seeds', 'of_subsets'),
  [(3, 1, 0.02, 0.0), (3, 4, 0.02, 0.05), (5, 4, 0.05, 0.02), (1, 4, 0, 0.05)],
)
def test_intervals_contain_the_truth(seeds, subsets, of_seeds, of_subsets):
  generator = np.random.default_rng(1)
  trials, inside = 200, 0
  for _ in range(trials):
    values = 0.7 + generator.normal(0, of_seeds, (seeds, 1, 1))
    values = values + generator.normal(0, of_subsets, (seeds, subsets, 1))
    estimate = bootstrap.estimate(values)
    inside += bool(estimate.low[0] <= 0.7 <= estimate.high[0])
  # 95 % of 200 are 190, with a standard deviation of 3.
  assert 181 <= inside <= 199


def test_an_interval_of_three_seeds_is_widened_as_student_asks():
  # Of the draws of 0, 1, 2 more than 2.5 % are all 0 and all 2.
  value, low, high = bootstrap.estimate(np.array([0.0, 1, 2])[:, None, None])
  # The quantiles are those of printed tables.
  widening = math.sqrt(3 / 2) * 4.302653 / 1.959964
  assert (value.item(), low.item(), high.item()) == pytest.approx(
    (1, 1 - widening, 1 + widening), rel=1e-6
  )


def test_an_arm_that_ran_with_fewer_seeds_widens():
  """As far as it would alone."""
  values = np.random.default_rng(0).normal(size=(5, 2, 2, 1))
  everything = bootstrap.estimate(values)
  values[3:, :, 1] = np.nan
  found = bootstrap.estimate(values)
  reach = (found.high - found.value)[0] / (everything.high - everything.value)[
    0
  ]
  # From the printed tables: t of four and of two degrees of freedom.
  expected = math.sqrt((3 / 2) / (5 / 4)) * 4.302653 / 2.776445
  assert reach.item() == pytest.approx(expected, rel=1e-6)


def test_what_counts_means_that_cannot_be_drawn_has_no_interval():
  """With two seeds N = 8, of one subset: the interval would be of N = 2."""
  values = np.random.default_rng(0).normal(size=(2, 4, 3, 2))
  values[:, 1:, :, 1] = np.nan
  few = bootstrap.estimate(values[..., :1])
  by_n = bootstrap.estimate(values)
  np.testing.assert_array_equal(by_n.low[:, 0], few.low[:, 0])
  assert np.isnan(by_n.low[:, 1]).all()
  for statistic in (
    lambda means: bootstrap.mean(means, axis=-1),
    lambda means: means[..., 0] - means[..., 1],
  ):
    both = bootstrap.estimate(values, statistic)
    assert both.value == pytest.approx(statistic(by_n.value))
    assert np.isnan([both.low, both.high]).all()


def test_a_mean_that_counts_an_arm_of_two_seeds_has_no_interval():
  values = np.random.default_rng(0).normal(size=(4, 2, 3, 1))
  values[2:, :, 1] = np.nan
  means = np.nanmean(values, axis=(0, 1))
  value, low, high = bootstrap.estimate(
    values, lambda m: m[..., :2, 0].mean(-1)
  )
  assert value == pytest.approx(means[:2, 0].mean())
  assert np.isnan([low, high]).all()
  _, low, high = bootstrap.estimate(
    values, lambda m: m[..., 2, 0] - m[..., 0, 0]
  )
  assert low < high


def test_one_merge_has_no_interval():
  value, low, high = bootstrap.estimate(np.array([[[0.5]]]))
  assert value.item() == 0.5
  assert np.isnan([low, high]).all()


def test_differences_are_paired():
  generator = np.random.default_rng(0)
  common = generator.normal(0, 1, (4, 3, 1, 1))
  values = common + np.array([0.0, 0.1])[:, None]
  value, low, high = bootstrap.estimate(
    values, lambda means: means[..., 1, 0] - means[..., 0, 0]
  )
  assert (float(value), float(low), float(high)) == pytest.approx((0.1,) * 3)


def test_intervals_are_the_same_every_time():
  values = np.random.default_rng(0).normal(size=(4, 3, 2))
  first, second = bootstrap.estimate(values), bootstrap.estimate(values)
  np.testing.assert_array_equal(first, second)
