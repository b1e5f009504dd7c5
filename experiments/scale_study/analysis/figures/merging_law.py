"""The merging law: fitted to few experts, asked about many."""

from collections.abc import Sequence

import numpy as np

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.bases import BASES
from experiments.scale_study.analysis.figures import style
from experiments.scale_study.analysis.figures.picture import Picture
from experiments.scale_study.analysis.law import (
  Fit,
  FITTED_UP_TO,
  which_losses,
)
from experiments.scale_study.analysis.methods import METHODS


def draw(results: Results, fits: Sequence[Fit]) -> Picture | None:
  """Draws a row of panels a method, a column a base.

  Nothing is drawn of a law that was fitted to as many points as it has
  parameters and is asked about no other.
  """
  fits = [fit for fit in fits if not np.isnan([fit.r_squared, fit.error]).all()]
  if not fits:
    return None
  methods = [m for m in METHODS if m in {fit.method for fit in fits}]
  bases = [b for b in BASES if b in {fit.base for fit in fits}]
  looks = style.steps(list(results.sizes))
  figure, axes = style.panels(len(methods), len(bases), sharey=True, height=2.4)
  for row, method in enumerate(methods):
    for column, base in enumerate(bases):
      title = f'{names.title(method)}, {names.title(base).lower()}'
      for fit in fits:
        if (fit.method, fit.base) == (method, base):
          _draw_fit(axes[row, column], results, fit, looks)
          title += _goodness(fit)
      style.title(axes[row, column], title)
  handles = [
    style.handle(f'{size} ({names.amount(count)})', **looks[size])
    for size, count in results.sizes.items()
  ]
  look = {'color': 'black', 'marker': 'o', 'linestyle': 'none'}
  handles += [
    style.handle('fitted', **look),
    style.handle('predicted', **look, markerfacecolor='white'),
  ]
  style.legend(figure, handles, columns=5)
  return Picture(
    'merging_law',
    'The merging law',
    _reading(fits),
    f'Lines are the law fitted where N ≤ {FITTED_UP_TO} (filled marks); open '
    f'marks are what it was asked to predict. {which_losses(fits)}. '
    'Form: arXiv 2509.24244.',
    figure,
  )


def _draw_fit(panel, results: Results, fit: Fit, looks) -> None:
  smallest = min(results.sizes.values())
  last = max(point.k for point in fit.points)
  dense = np.linspace(min(point.k for point in fit.points), last, 100)
  for size, look in looks.items():
    points = [point for point in fit.points if point.size == size]
    if not points:
      continue
    scale = results.sizes[size] / smallest
    color = look['color']
    panel.plot(dense, fit.curve(size, scale, dense), color=color, linewidth=1.3)
    for used in (True, False):
      panel.plot(
        [p.k for p in points if p.fitted == used],
        [p.seen for p in points if p.fitted == used],
        **look,
        markersize=5.5,
        linestyle='none',
        markerfacecolor=color if used else 'white',
      )
  style.count_ticks(panel, sorted({point.k for point in fit.points}))
  panel.set_ylabel('loss, nats a token', fontsize=style.NORMAL)


def _goodness(fit: Fit) -> str:
  known = [
    f'{kind} {names.number(value, digits=3)}'
    for kind, value in (
      ('fitted', fit.r_squared),
      ('predicted', fit.r_squared_predicted),
    )
    if not np.isnan(value)
  ]
  return f'\nR² {", ".join(known)}' if known else ''


def _reading(fits: Sequence[Fit]) -> str:
  rises = sum(fit.rises for fit in fits)
  sentences = [
    f'The fitted loss rises with the number of experts in {rises} of '
    f'{len(fits)} fits (base and method) and falls in {len(fits) - rises}.'
  ]
  settled = [fit.r_squared for fit in fits if not np.isnan(fit.r_squared)]
  if settled:
    low, high = (
      names.number(end, digits=3) for end in (min(settled), max(settled))
    )
    sentences.append(f'Where it was fitted, R² is {low} to {high}.')
  asked = [fit for fit in fits if not np.isnan(fit.error)]
  if asked:
    law, unchanged, line = np.transpose(
      [(fit.error, fit.error_unchanged, fit.error_line) for fit in asked]
    )
    means = [
      names.number(float(errors.mean()), digits=3)
      for errors in (law, unchanged, line)
    ]
    sentences.append(
      f'Beyond N = {FITTED_UP_TO} it is off by {means[0]} nats a token on '
      f'average, the forecast that nothing changes any more by {means[1]}, a '
      f'line in log N for each size by {means[2]}; of {len(asked)} fits the '
      f'law is better than the first in {sum(law < unchanged)}, than the '
      f'second in {sum(law < line)}.'
    )
  loose = sum(bool(fit.undetermined) for fit in fits)
  if loose:
    sentences.append(
      f'In {loose} of {len(fits)} fits parameters lie at their bounds or are '
      'not settled by the points.'
    )
  notes = [*dict.fromkeys(fit.note for fit in fits if fit.note)]
  if notes:
    sentences.append(f'Note: {"; ".join(notes)}.')
  return ' '.join(sentences)
