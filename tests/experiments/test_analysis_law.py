"""The merging law, on losses that obey it exactly."""

import dataclasses

import numpy as np
import pytest

from experiments.scale_study.analysis import (
  figures,
  law,
  sections,
  tables,
  verdicts,
)
from experiments.scale_study.analysis.figures import merging_law
from tests.experiments import made_up_grid
from tests.experiments.made_up_grid import Truth

_NAMES = ('floor', 'B', 'beta', 'A', 'gamma', 'b')
_FALLING = (0.5, 0.4, 0.6, 0.3, 0.4, 0.5)
_RISING = (1.0, 0.8, 0.3, -0.5, 0.2, 1.0)
_NOTHING = dict.fromkeys(('beta', 'gamma', 'b'), np.nan)
_SIZES = {'s': 1e5, 'm': 2e5, 'l': 4e5}


def _fit(truth, ks, sizes=_SIZES):
  counts = np.array(list(sizes.values()))
  losses = [
    [Truth(law=truth).loss(k, np.log2(count / 1e5)) for k in ks]
    for count in counts
  ]
  return law.fit(np.array(losses), counts, np.array(ks), sizes=tuple(sizes))


@pytest.mark.parametrize('truth', [_FALLING, _RISING])
def test_the_law_is_recovered_and_predicts(truth):
  fit = _fit(truth, (1, 2, 4, 6, 8))
  assert fit.form == 'all sizes'
  found = [fit.parameters[name] for name in _NAMES]
  assert found == pytest.approx(truth, rel=1e-3)
  assert fit.undetermined == ()
  assert fit.rises == (truth is _RISING)
  assert fit.r_squared == pytest.approx(1)
  assert fit.r_squared_predicted == pytest.approx(1)
  assert fit.error < 1e-6 < fit.error_unchanged
  asked = [point.k for point in fit.points if not point.fitted]
  assert asked == [6, 8] * 3


def _explained(points):
  """R² of points, from its definition."""
  seen, predicted = np.array([(p.seen, p.law) for p in points]).T
  return 1 - np.mean((seen - predicted) ** 2) / np.var(seen)


def test_noise_lowers_r_squared():
  counts, ks = np.array(list(_SIZES.values())), np.array((1, 2, 4, 6, 8))
  exact = np.array(
    [
      [Truth(law=_FALLING).loss(k, np.log2(c / 1e5)) for k in ks]
      for c in counts
    ]
  )
  noise = np.random.default_rng(0).normal(0, 0.03, exact.shape)
  fit = law.fit(exact + noise, counts, ks, sizes=tuple(_SIZES))
  assert fit.form == 'all sizes'
  fitted, asked = (
    [p for p in fit.points if p.fitted == used] for used in (True, False)
  )
  assert [p.seen for p in fitted] == [*(exact + noise)[:, :3].ravel()]
  assert fit.r_squared == pytest.approx(_explained(fitted))
  assert fit.r_squared_predicted == pytest.approx(_explained(asked))
  assert 0.8 < fit.r_squared < 0.9999
  assert fit.r_squared_predicted < fit.r_squared
  # A fit of six numbers is nearer to the points than the truth is.
  left = [[p.seen - p.law for p in fitted], noise[:, :3].ravel()]
  assert np.linalg.norm(left[0]) < np.linalg.norm(left[1])


def test_three_points_a_size_have_an_r_squared():
  """Two sizes, a line in 1 / k each: compared with numpy's least squares."""
  sizes, ks = {'s': 1e5, 'l': 4e5}, np.array([1, 2, 4, 6, 8])
  losses = np.array([[3.0, 2.2, 1.5, 1.5, 1.3], [2.0, 1.1, 0.9, 0.5, 0.6]])
  fit = law.fit(losses, np.array([1e5, 4e5]), ks, sizes=tuple(sizes))
  design = np.stack([np.ones(5), 1 / ks], axis=1)
  lines = [
    np.linalg.lstsq(design[:3], row[:3], rcond=None)[0] for row in losses
  ]
  predicted = np.array([design @ line for line in lines])
  for columns, found in (
    (slice(3), fit.r_squared),
    (slice(3, None), fit.r_squared_predicted),
  ):
    seen, said = losses[:, columns], predicted[:, columns]
    expected = 1 - np.sum((seen - said) ** 2) / np.sum(
      (seen - seen.mean()) ** 2
    )
    assert found == pytest.approx(expected) and found < 0.999


def test_the_figure_says_how_good_the_fit_is():
  study = made_up_grid.study(
    Truth(law=_FALLING), methods=('ties',), ns=(1, 2, 4, 8)
  )
  *_, picture = figures.draw_all(
    study, verdicts.judge_all(study), law.fit_all(study)
  )
  assert 'Where it was fitted, R² is 1.000 to 1.000.' in picture.reading
  titles = [axes.get_title(loc='left') for axes in picture.figure.axes]
  assert titles == [
    f'TIES, {base}\nR² fitted 1.000, predicted 1.000'
    for base in ('pretrained', 'instruction-tuned')
  ]


def test_it_is_about_the_same_tasks_whatever_is_merged():
  """If their losses were kept: in older results it is about those merged."""
  made = made_up_grid.study(Truth(law=_RISING), methods=('ties',), ns=(1, 2, 4))
  falling = Truth(law=_FALLING)

  def with_losses(cell):
    # Around the mean, as tasks differ.
    mean = falling.loss(cell.n, np.log2(cell.parameters / 1e5))
    few, many = mean - 0.1, mean + 0.1
    return dataclasses.replace(cell, losses={'a': few, 'b': many, 'c': mean})

  kept = dataclasses.replace(made, cells=tuple(map(with_losses, made.cells)))
  for study, tasks, truth in (
    (made, 'merged', _RISING),
    (kept, 'all held-in', _FALLING),
  ):
    fits = law.fit_all(study)
    assert {fit.tasks for fit in fits} == {tasks}
    for fit in fits:
      smallest = min(made.sizes.values()) / 1e5
      assert fit.parameters['A'] == pytest.approx(
        truth[3] * smallest ** -truth[4], rel=1e-2
      )
  assert 'all held-in tasks' in law.which_losses(fits)


def test_what_rounding_keeps_off_a_bound_is_at_it():
  """A loss without a floor is fitted with one of 1e-20 or so."""
  for at_bounds in ({'floor': 0.0}, {'floor': 0.0, 'beta': 4.0}):
    truth = dict(zip(_NAMES, _FALLING, strict=True)) | at_bounds
    fit = _fit(tuple(truth.values()), (1, 2, 4, 8))
    assert fit.parameters == pytest.approx(truth, abs=1e-3)
    assert {name: fit.parameters[name] for name in at_bounds} == at_bounds
    assert at_bounds.keys() <= {*fit.undetermined}


def test_a_line_in_log_k_is_forecast_beside_the_law():
  """It falls by 1 from one k to twice as many."""
  ks = np.array([1, 2, 4, 8, 16])
  fit = law.fit(
    np.array([[5.0, 4.0, 3.0, 2.5, 1.0]]), np.array([1.0]), ks, sizes=('s',)
  )
  # It says 2 and 1.
  assert fit.error_line == pytest.approx(0.25)
  assert fit.error_unchanged == pytest.approx((0.5 + 2) / 2)


def test_two_points_of_two_parameters_are_not_drawn():
  study = made_up_grid.study(sizes={'s': 100}, methods=('ties',), ns=(2, 4))
  assert merging_law.draw(study, law.fit_all(study)) is None
  study = made_up_grid.study(sizes={'s': 100}, methods=('ties',), ns=(2, 4, 8))
  assert merging_law.draw(study, law.fit_all(study)) is not None


def test_two_numbers_of_experts_do_not_settle_b():
  fit = _fit((*_FALLING[:-1], 0.0), (2, 4, 6, 8))
  assert fit.parameters['b'] == 0 and 'b = 0' in fit.note
  assert fit.parameters['A'] == pytest.approx(0.3, rel=1e-3)
  assert fit.error < 1e-6


def test_two_sizes_get_a_law_each():
  sizes = {'s': 1e5, 'l': 4e5}
  fit = _fit((*_FALLING[:-1], 0.0), (2, 4, 8), sizes)
  assert fit.form == 'each size' and '2 of 3 sizes' in fit.note
  # F = floor + B · S^−β and T = A · S^−γ, with S = 1 and 4.
  expected = {
    'F(s)': 0.5 + 0.4,
    'F(l)': 0.5 + 0.4 * 4**-0.6,
    'T(s)': 0.3,
    'T(l)': 0.3 * 4**-0.4,
  }
  assert fit.parameters == pytest.approx(expected)
  assert np.isnan(fit.r_squared)
  assert fit.error < 1e-9
  dense = fit.curve('l', 4, np.array([2.0, 8.0]))
  tails = expected['T(l)'] / np.array([2, 8])
  assert dense == pytest.approx(expected['F(l)'] + tails)
  assert not fit.rises
  assert _fit((*_RISING[:-1], 0.0), (2, 4, 8), sizes).rises


def test_a_flat_loss_does_not_settle_the_exponents():
  fit = _fit((0.5, 0.0, 0.6, 0.0, 0.4, 0.5), (1, 2, 4, 8))
  assert {'B', 'beta', 'gamma', 'b'} <= set(fit.undetermined)
  assert np.isnan(fit.r_squared)
  # Nor are they told, and the law is what it is without them.
  told = {'floor': 0.5, 'B': 0, 'A': 0, **_NOTHING}
  assert fit.parameters == pytest.approx(told, abs=1e-6, nan_ok=True)
  assert fit.curve('s', 1, np.array([1, 8])) == pytest.approx([0.5, 0.5])
  assert [point.law for point in fit.points] == pytest.approx([0.5] * 12)


def test_a_loss_that_does_not_fall_with_size_has_no_beta():
  truth = (0.5, 0.0, 0.6, *_FALLING[3:])
  fit = _fit(truth, (1, 2, 4, 6, 8))
  assert {'B', 'beta'} <= {*fit.undetermined}
  told = dict(zip(_NAMES, truth, strict=True)) | {'beta': np.nan}
  # As near as least squares come where one parameter is at its bound.
  assert fit.parameters == pytest.approx(told, abs=1e-3, nan_ok=True)
  assert fit.error < 1e-5
  assert 'β = –, A = 0.3, ' in sections.law([fit])


def test_a_number_at_its_bound_is_not_settled():
  """A floor that falls faster than any that is looked for."""
  fit = _fit((0.5, 0.4, 6.0, 0.3, 0.4, 0.5), (1, 2, 4, 8))
  assert fit.parameters['beta'] == pytest.approx(4)
  assert fit.undetermined == ('beta',)


@pytest.mark.parametrize('ks', [(8,), (4, 8), (6, 8)])
def test_too_few_numbers_of_experts_are_not_fitted(ks):
  fit = _fit(_FALLING, ks)
  assert fit.form == 'none' and not fit.points and not fit.parameters
  assert fit.note == 'needs two numbers of experts up to 4 at one size'


def test_a_size_with_holes_is_left_out():
  losses = np.array([[3.0, 2.0, 1.5], [np.nan, 5.0, 5.0]])
  fit = law.fit(
    losses, np.array([1.0, 2.0]), np.array([2, 4, 8]), sizes=('s', 'm')
  )
  # F + T / 2 = 3 and F + T / 4 = 2.
  assert fit.parameters == pytest.approx({'F(s)': 1, 'T(s)': 4})
  assert {point.size for point in fit.points} == {'s'}
  assert fit.error == pytest.approx(0)
  assert fit.error_unchanged == pytest.approx(0.5)


def test_r_squared_of_known_cases():
  seen = np.array([1.0, 2.0, 3.0])
  assert law.r_squared(seen, seen) == 1
  assert law.r_squared(seen, np.full(3, 2.0)) == 0
  assert law.r_squared(seen, seen[::-1]) == -3
  assert np.isnan(law.r_squared(np.ones(3), np.ones(3)))


def test_single_experts_change_nothing_but_the_law():
  made = made_up_grid.study(
    Truth(law=_FALLING, noise=0.02),
    ns=(1, 2, 4, 6, 8),
    settings=('validated', 'fixed'),
    sweeps=True,
  )
  several = tuple(cell for cell in made.cells if cell.n > 1)
  # Single experts that would be left out of every mean, if they counted.
  single = tuple(
    dataclasses.replace(cell, expert=cell.base_scores, drift=9.0)
    for cell in made.cells
    if cell.n == 1
  )
  assert len(single) > 0
  before = dataclasses.replace(made, cells=several)
  after = dataclasses.replace(made, cells=single + several)

  def results(study):
    judged = verdicts.judge_all(study)
    pictures = {
      picture.name: (picture.reading, picture.caption, _drawn(picture.figure))
      for picture in figures.draw_all(study, judged, [])
    }
    return judged, study.exclusions, [*tables.merge_rows(study)], pictures

  # NaN, where nothing was found, is not equal to itself.
  assert repr(results(before)) == repr(results(after))
  assert all('b = 0' in fit.note for fit in law.fit_all(before))
  assert {fit.note for fit in law.fit_all(after)} == {''}


def _drawn(figure):
  """What is drawn, as numbers."""
  return [
    (line.get_xydata().tolist(), line.get_color())
    for axes in figure.axes
    for line in axes.lines
  ]


def test_losses_are_means_over_subsets_and_seeds():
  study = made_up_grid.study(
    Truth(law=_FALLING),
    bases=('pretrained',),
    methods=('average', 'ties'),
    ns=(1, 2, 4, 8),
  )
  fits = law.fit_all(study)
  assert [(fit.base, fit.method) for fit in fits] == [
    ('pretrained', 'average'),
    ('pretrained', 'ties'),
  ]
  found = [fits[1].parameters[name] for name in _NAMES]
  assert found == pytest.approx(_FALLING, rel=1e-3)
