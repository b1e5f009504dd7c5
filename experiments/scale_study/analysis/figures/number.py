"""Held-in and held-out by number of experts."""

import numpy as np

from experiments.scale_study.analysis import (
  effects,
  measures,
  names,
  paper,
  verdicts,
)
from experiments.scale_study.analysis.aggregate import BASE, Grid, SIZE
from experiments.scale_study.analysis.bootstrap import Estimate, mean
from experiments.scale_study.analysis.figures import marks, style
from experiments.scale_study.analysis.figures.picture import (
  bars,
  left_out,
  part,
  Picture,
)

_MULTITASK = {'color': 'black', 'linestyle': 'dashed', 'linewidth': 1.2}
_UNMERGED = {'color': 'black', 'linestyle': 'dotted', 'linewidth': 1.2}
_GUESSING = {'color': 'black', 'linestyle': 'dashdot', 'linewidth': 1.2}


def draw_held_out(grid: Grid) -> Picture:
  """Draws held-out, a panel a base, a line a method."""
  grid = grid.alike(SIZE, BASE)
  # [bases, methods, n] and [bases]
  held_out = grid.estimate(
    measures.held_out, lambda means: mean(means, axis=-4)
  )
  multitask = mean(grid.means(measures.held_out_multitask), (0, 2, 3))
  figure, axes = style.panels(2, len(grid.bases), sharey=True)
  for b, base in enumerate(grid.bases):
    ours, theirs = axes[:, b]
    series = {m: part(held_out, b, j) for j, m in enumerate(grid.methods)}
    marks.lines(ours, grid.ns, series, style.METHOD_LOOKS)
    marks.level(ours, multitask[b], **_MULTITASK)
    style.count_ticks(ours, grid.ns)
    style.beside_paper(ours, theirs, base, 'base', names.HELD_OUT)
  for theirs, base in zip(axes[1], grid.bases, strict=True):
    marks.paper_lines(theirs, 'held_out', [base])
  style.legend(
    figure,
    [
      *style.method_handles(grid.methods),
      style.handle('Multitask model', **_MULTITASK),
    ],
    columns=5,
  )
  return Picture(
    'held_out_by_number',
    'Held-out by number of experts',
    _held_out_reading(grid, held_out, multitask),
    f'Mean over sizes. {left_out(grid, ["held_out"])}{bars(grid.results)} '
    f'{paper.CITATION}: a line a size.',
    figure,
  )


def draw_by_size(grid: Grid) -> Picture:
  """Draws held-in and held-out, a row of panels a size, a line a base."""
  reading = _cost_reading(grid)
  grid = grid.alike(SIZE, BASE)
  columns = (
    ('held_in', measures.held_in, measures.held_in_multitask),
    ('held_out', measures.held_out, measures.held_out_multitask),
  )[: 1 + grid.has_held_out]
  figure, axes = style.panels(len(grid.sizes) + 1, len(columns), sharey='col')
  for column, (name, measure, multitask) in enumerate(columns):
    title = name.replace('_', '-')
    merged = grid.estimate(measure, lambda means: mean(means, axis=-2))
    for i, size in enumerate(grid.sizes):
      panel = axes[i, column]
      series = {base: part(merged, i, b) for b, base in enumerate(grid.bases)}
      marks.lines(panel, grid.ns, series, style.BASE_LOOKS)
      _levels(panel, grid, i, multitask, 'dashed')
      if name == 'held_in':
        _levels(panel, grid, i, measures.held_in_base, 'dotted')
      _levels(panel, grid, i, grid.results.guessing()[column], 'dashdot')
      style.count_ticks(panel, grid.ns)
      parameters = names.amount(grid.results.sizes[size])
      style.title(panel, f'{size} ({parameters}): {title}')
    style.title(axes[-1, column], f'The paper: {title}')
    for panel in axes[:, column]:
      style.reference(panel, 1, ('expert', 'base')[column])
      label = (names.HELD_IN, names.HELD_OUT)[column]
      panel.set_ylabel(label, fontsize=style.NORMAL)
    marks.paper_lines(axes[-1, column], name, list(style.BASE_LOOKS))
  style.legend(
    figure,
    [
      *style.base_handles(list(style.BASE_LOOKS)),
      style.handle('Multitask model', **_MULTITASK),
      style.handle('Base, not merged', **_UNMERGED),
      style.handle('Guessing', **_GUESSING),
    ],
    columns=3,
  )
  return Picture(
    'by_number_and_size',
    'Held-in and held-out by number of experts, for every size',
    reading,
    'Mean over methods. Dotted lines are what the base reaches of the '
    'experts’ scores without any merge, those of dots and dashes what a guess '
    f'does; the mark at their end is of the base. {left_out(grid)}'
    f'{bars(grid.results)} {paper.CITATION}.',
    figure,
  )


def _means(grid: Grid, measure: measures.Measure) -> np.ndarray:
  """Means over methods and N, [sizes, bases]."""
  return mean(grid.means(measure), axis=(-2, -1))


def _levels(panel, grid: Grid, i: int, measure, linestyle: str) -> None:
  for base, y in zip(grid.bases, _means(grid, measure)[i], strict=True):
    marks.level(panel, y, **style.BASE_LOOKS[base], linestyle=linestyle)


def _held_out_reading(
  grid: Grid, held_out: Estimate, multitask: np.ndarray
) -> str:
  above = grid.means(measures.held_out)
  if np.isnan(above).all():
    return 'No category may be counted.'
  over = grid.means(measures.over_multitask)
  sentences = [
    f'{_count(above > 1, above)} groups of merges (size, base, method, N) '
    'score above their base on held-out tasks, '
    f'{int(np.sum(grid.estimate(measures.held_out).low > 1))} with all of '
    'their interval'
  ]
  if not np.isnan(over).all():
    sentences[0] += f', {_count(over > 0, over)} above the multitask model'
  for b, base in enumerate(grid.bases):
    ends = mean(held_out.value[b], axis=0)
    course = ' and '.join(
      f'{names.number(float(ends[k]))} at N = {grid.ns[k]}'
      for k in sorted({0, len(grid.ns) - 1})
    )
    sentence = f'From the {base} base the mean over methods is {course}'
    if not np.isnan(multitask[b]):
      sentence += f', the multitask model {names.number(multitask[b])}'
    sentences.append(sentence)
  return '. '.join(sentences) + '.'


def _cost_reading(grid: Grid) -> str:
  if len(grid.ns) == 1:
    return f'Only N = {grid.ns[0]} was run.'
  means = grid.alike(SIZE, BASE).means(measures.held_in)
  lost = mean(means[..., 0] - means[..., -1], axis=(-2, -1))
  costs = [
    f'{names.number(float(cost))} at {size}'
    for size, cost in zip(grid.sizes, lost, strict=True)
    if not np.isnan(cost)
  ]
  if not costs:
    return 'No category may be counted.'
  return (
    f'Going from {grid.ns[0]} to {grid.ns[-1]} experts costs '
    f'{names.join(costs)} of held-in, mean over bases and methods. '
    f'{_shrinking(grid)}'
  )


def _shrinking(grid: Grid) -> str:
  """Says what finding 4 is, which has more categories than the picture."""
  effect = effects.loss_shrinks(grid, measures.held_in)
  verdict = verdicts.judge('4', effect, 'validated', 'ratio')
  if np.isnan(verdict.effect):
    return f'Sizes cannot be compared: {verdict.reason}.'
  less = names.interval(
    verdict.effect, verdict.low, verdict.high, signed=True, digits=3
  )
  return (
    'Finding 4, of what may be counted at every size for each base alone, is '
    f'{verdict.verdict}: {less} {verdict.unit}; {verdict.reason}.'
  )


def _count(holds: np.ndarray, known: np.ndarray) -> str:
  return f'{int(holds.sum())} of {int((~np.isnan(known)).sum())}'
