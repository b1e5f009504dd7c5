"""The paper's own figures stand beside those of a study."""

import dataclasses
import subprocess
import sys

from matplotlib import colors
from matplotlib.figure import Figure
import numpy as np
import pytest

from experiments.scale_study.analysis import figures, verdicts
from experiments.scale_study.analysis import scores as scores_of
from experiments.scale_study.analysis.bootstrap import Estimate
from experiments.scale_study.analysis.figures import (
  base_quality,
  drift,
  findings,
  marks,
  methods,
  number,
  scores,
  size,
  sweep,
)
from experiments.scale_study.analysis.sweeps import sweep_points
from tests.experiments import made_up_grid
from tests.experiments.made_up_grid import Truth

# arXiv 2410.03617, tables of the appendix: sizes from the smallest, task
# arithmetic of 2 and 8 experts.
PRETRAINED = {
  'held_in': [(0.66, 0.39), (0.68, 0.42), (0.80, 0.67)],
  'held_out': [(1.01, 1.07), (1.06, 1.00), (1.29, 1.35)],
}
TUNED = {
  'held_in': [(0.91, 0.86), (0.95, 0.88), (0.96, 0.92), (1.00, 0.93)],
  'held_out': [(1.03, 1.05), (1.06, 1.03), (1.05, 1.18), (1.00, 1.09)],
}
NAMES = ('1B', '8B', '24B', '64B')


@pytest.fixture(scope='module')
def panels():
  """The panels of every picture, by its name."""
  study = made_up_grid.study(
    Truth(held_out_multitask=1.3), sizes={'s': 121_000, 'm': 372_000}
  )
  return {
    picture.name: picture.figure.axes
    for picture in figures.draw_all(study, verdicts.judge_all(study), [])
  }


def curves(panel):
  return {tuple(line.get_ydata()) for line in panel.lines}


def test_held_in_by_size(panels):
  """Below each base of the study, a line a number of experts."""
  *_, pretrained, tuned = panels['held_in_by_size']
  for panel, rows in ((pretrained, PRETRAINED), (tuned, TUNED)):
    assert set(zip(*rows['held_in'], strict=True)) <= curves(panel)


def test_held_in_by_base(panels):
  """The marks of 8 experts lie along a row: their place is their x."""
  _, theirs = panels['held_in_by_base']
  marks = {x for line in theirs.lines for x in line.get_xdata()}
  assert {n8 for _, n8 in PRETRAINED['held_in'] + TUNED['held_in']} <= marks


def test_held_out_by_number(panels):
  *_, pretrained, tuned = panels['held_out_by_number']
  for panel, rows in ((pretrained, PRETRAINED), (tuned, TUNED)):
    assert set(rows['held_out']) <= curves(panel)


def test_by_number_and_size(panels):
  """A last row of panels, with both bases in each."""
  *_, held_in, held_out = panels['by_number_and_size']
  for panel, name in ((held_in, 'held_in'), (held_out, 'held_out')):
    assert {*PRETRAINED[name], *TUNED[name]} <= curves(panel)


@pytest.mark.parametrize('name', ['held_out_by_number', 'by_number_and_size'])
def test_the_paper_is_drawn_to_the_scale_of_this_study(panels, name):
  """Panels are in rows of two, the last of which is the paper's."""
  for column in (panels[name][::2], panels[name][1::2]):
    *_, theirs = column
    assert len({panel.get_ylim() for panel in column}) == 1
    low, high = theirs.get_ylim()
    heights = [
      text.xyann[1] for text in theirs.texts if text.get_text() in NAMES
    ]
    assert len(heights) >= 3 and low < min(heights) and max(heights) < high
    # Letters of 8 points in panels of 2.9 inches or a little less.
    apart = np.diff(sorted(heights)) / (high - low)
    assert apart.min() * 2.3 * 72 > 8


def test_methods_compared(panels):
  """Held-in 0.93 by every method, held-out 1.09 to 1.10, at 64B.

  From 2 to 8 experts there is task arithmetic, from either base.
  """
  *_, held_in, held_out = panels['methods_compared']
  for panel, name, ends in (
    (held_in, 'held_in', (0.93, 0.93)),
    (held_out, 'held_out', (1.09, 1.10)),
  ):
    merged = {PRETRAINED[name][-1], TUNED[name][-1]}
    assert {ends} | merged <= curves(panel)
    low, high = panel.get_ylim()
    for line in panel.lines:
      assert low < min(line.get_ydata()) <= max(line.get_ydata()) < high
    said = [text.get_text() for text in panel.texts]
    assert {'Pretrained', 'Instruction-tuned'} <= {*said}
  titles = [panel.get_title(loc='left') for panel in panels['methods_compared']]
  assert titles[0] == 'Pretrained base, m: held-in'
  assert titles[-1] == 'The paper, 64B: held-out'


def test_no_interval_hides_a_mark_or_another(panels):
  """Those of two bases are a little apart, and under the marks."""
  ours, _ = panels['held_in_by_base']
  heights = [
    {y for segment in bars.get_segments() for y in segment[:, 1]}
    for bars in ours.collections
  ]
  # 2 sizes, 4 methods and 2 bases.
  assert len(heights) == len(set().union(*heights)) == 16
  marks = [line for line in ours.lines if line.get_marker() in 'os']
  lowest = min(mark.get_zorder() for mark in marks)
  assert max(bars.get_zorder() for bars in ours.collections) < lowest


def test_the_legend_of_drift_says_what_open_marks_are(panels):
  (legend,) = panels['drift'][0].figure.legends
  (mark,) = (
    mark
    for mark, text in zip(legend.get_lines(), legend.get_texts(), strict=True)
    if text.get_text() == 'N = 2'
  )
  assert mark.get_markerfacecolor() == 'white'


def test_a_caption_names_what_does_not_count_in_its_picture():
  study = made_up_grid.study(
    sizes={'s': 121_000, 'm': 372_000},
    failing=[
      ('s', 'pretrained', 'sentiment'),
      ('m', 'pretrained', 'topic'),
      ('s', 'pretrained', 'word_sense'),
    ],
  )
  grid = study.grid()
  said = {
    name: draw(grid).caption
    for name, draw in {
      'base': base_quality.draw,
      'size': size.draw,
      'held-out': number.draw_held_out,
      'both': number.draw_by_size,
      'methods': methods.draw,
      'drift': drift.draw,
    }.items()
  }
  assert 'to keep: sentiment, word sense and topic. ' in said['both']
  assert 'to keep: sentiment and topic.' in said['drift']
  assert 'to keep: word sense. ' in said['held-out']
  # Of both bases at the largest size alone, which nothing else fails at.
  assert 'to keep: topic. ' in said['methods']
  held_in = 'to keep: sentiment ({}) and topic ({}). '
  assert (
    held_in.format(
      's, pretrained; s, instruction-tuned',
      'm, pretrained; m, instruction-tuned',
    )
    in said['base']
  )
  at_both = 's, pretrained; m, pretrained'
  assert held_in.format(at_both, at_both) in said['size']


def test_a_panel_without_anything_to_count_says_so():
  """Every gate of the pretrained base fails at m, the larger size."""
  study = made_up_grid.study(
    sizes={'s': 121_000, 'm': 372_000},
    failing=[
      ('m', 'pretrained', name)
      for name in (*made_up_grid.HELD_IN, *made_up_grid.HELD_OUT)
    ],
  )
  grid = study.grid()

  def empty(draw):
    """By panel, without those of the paper."""
    return [
      'no category may be counted' in [text.get_text() for text in panel.texts]
      for panel in draw(grid).figure.axes
      if 'paper' not in panel.get_title(loc='left')
    ]

  # What compares bases counts nothing at m, what compares sizes nothing of the
  # pretrained one, and what compares both nothing at all.
  assert empty(base_quality.draw) == [False]
  assert empty(size.draw) == [True, False]
  assert empty(methods.draw) == [True] * 4
  for draw, count in (
    (drift.draw, 4),
    (number.draw_held_out, 2),
    (number.draw_by_size, 4),
  ):
    assert empty(draw) == [True] * count
  nothing = dict.fromkeys(grid.countable, frozenset())
  grid = dataclasses.replace(grid, countable=nothing)
  assert empty(base_quality.draw) == [True]


def test_a_sweep_varies_one_hyperparameter_alone():
  study = made_up_grid.study(
    sizes={'s': 100}, bases=['pretrained'], ns=[2], seeds=1, sweeps=True
  )
  for picture in sweep.draw_all(study):
    assert 'the other hyperparameters are fixed' in picture.caption
    assert 'chosen on the dashed curves' not in picture.caption


def _swept(study, value):
  """Scores of sweeps: of x on either split, and of the seed."""
  cells = tuple(
    dataclasses.replace(
      cell,
      scores={
        task: value(cell) * expert for task, expert in cell.expert.items()
      },
      held_out=(),
    )
    if cell.setting == 'sweep'
    else cell
    for cell in study.cells
  )
  return dataclasses.replace(study, cells=cells)


def test_a_sweep_is_read_by_method_and_chosen_with_each_seed():
  study = made_up_grid.study(
    sizes={'s': 100},
    bases=['pretrained'],
    methods=['task_arithmetic', 'ties'],
    ns=[8],
    seeds=2,
    sweeps=True,
  )

  def value(cell):
    """Validation wants 0.5 with seed 0, 1 with seed 1; test always 1."""
    scale = cell.hyperparameters['scale']
    best = 0.5 if (cell.split, cell.seed) == ('validation', 0) else 1.0
    return 0.6 if scale == best else 0.4

  scale, _ = sweep.draw_all(_swept(study, value))
  assert (
    'With 8 experts, the scale λ that is best on validation examples, by base '
    'and seed, is 0.5 to 1 at s for Task arithmetic; 0.5 to 1 at s for TIES.'
  ) in scale.reading
  # Seed 0 misses 0.6 − 0.4, seed 1 nothing.
  assert 'base and seed misses 0.100 of held-in' in scale.reading
  # Two seeds and one subset: no interval, and no bar.
  assert 'no bar' in scale.caption


def test_a_sweep_is_one_picture_of_all_sizes_and_the_most_experts():
  study = made_up_grid.study(
    sizes={'s': 121_000, 'm': 372_000},
    bases=['pretrained'],
    methods=['ties'],
    ns=[2, 8],
    sweeps=True,
  )
  best = {('s', 8): 0.1, ('m', 8): 0.5}

  def value(cell):
    """Of two experts it would be 0.2; elsewhere of a curve it is 0.4."""
    place = cell.hyperparameters.get('density')
    return 0.6 if place == best.get((cell.size, cell.n), 0.2) else 0.4

  pictures = {p.name: p for p in sweep.draw_all(_swept(study, value))}
  assert [*pictures] == ['sweep_scale', 'sweep_density']
  density = pictures['sweep_density']
  assert 'is 0.1 at s and 0.5 at m for TIES with scale 1.' in density.reading
  (panel,) = density.figure.axes
  # Densities 0.1, 0.2 and 0.5, on test and on validation examples.
  curves = [
    (line.get_linestyle(), line.get_color(), line.get_ydata())
    for line in panel.lines
    if len(line.get_ydata()) == 3
  ]
  solid, dashed = (
    {color: [*y] for style, color, y in curves if style == drawn}
    for drawn in ('-', '--')
  )
  assert [*solid] == [*dashed] and len(curves) == 4
  for split in (solid, dashed):
    assert [*split.values()] == [
      pytest.approx([0.6, 0.4, 0.4]),
      pytest.approx([0.4, 0.4, 0.6]),
    ]
  (legend,) = density.figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [
    's (121k)',
    'm (372k)',
    'test',
    'validation',
  ]


def test_a_sweep_compares_bases_over_the_same_categories():
  """The pretrained base fails at topic, which is easy for the other."""
  study = made_up_grid.study(
    sizes={'s': 100},
    methods=['task_arithmetic'],
    ns=[8],
    sweeps=True,
    failing=[('s', 'pretrained', 'topic')],
  )
  easy = [
    dataclasses.replace(
      cell, scores={**cell.scores, 'topic': 9 * cell.expert['topic']}
    )
    for cell in study.cells
  ]
  before, after = (
    {(p.base, p.x, p.split): p.value for p in sweep_points(of)}
    for of in (study, dataclasses.replace(study, cells=tuple(easy)))
  )
  assert after == pytest.approx(before)
  (picture,) = sweep.draw_all(study)
  assert 'Not counted' in picture.caption and 'topic' in picture.caption


def test_a_sweep_shows_its_intervals():
  study = made_up_grid.study(
    Truth(noise=0.05),
    sizes={'s': 100},
    bases=['pretrained'],
    methods=['task_arithmetic'],
    ns=[8],
    sweeps=True,
  )
  (picture,) = sweep.draw_all(study)
  drawn = {
    tuple(segment[:, 1])
    for bars in picture.figure.axes[0].collections
    for segment in bars.get_segments()
  }
  assert drawn == {
    (p.low, p.high) for p in sweep_points(study) if p.split == 'test'
  }


@pytest.mark.parametrize(
  ('reach', 'shown'), [(0.2, (0.6, 1.2)), (12.7, (-0.2, 2.0))]
)
def test_long_intervals_leave_the_panel(reach, shown):
  """What is drawn are points 0.2 apart: bars add at most 1 on each side."""
  value = np.array([0.8, 1.0, np.nan])
  panel = Figure().subplots()
  panel.margins(0)
  series = Estimate(value, value - reach, value + reach)
  marks.line(panel, [2, 4, 8], series, color='black')
  panel.autoscale_view()
  assert panel.get_ylim() == pytest.approx(shown)
  (bars,) = panel.collections
  drawn = [tuple(segment[:, 1]) for segment in bars.get_segments()]
  assert drawn == [(v - reach, v + reach) for v in value[:2]]


def test_findings_are_drawn_if_one_has_an_effect():
  study = made_up_grid.study(sizes={'s': 100}, bases=['pretrained'], ns=(2,))
  judged = verdicts.judge_all(study)
  drawn = {picture.name for picture in figures.draw_all(study, judged, [])}
  effects = [verdict.effect for verdict in judged]
  assert ('findings' in drawn) == np.isfinite(effects).any()
  nothing = [dataclasses.replace(v, effect=np.nan) for v in judged]
  left = {picture.name for picture in figures.draw_all(study, nothing, [])}
  assert left == drawn - {'findings'}


def _verdict(finding, outcome, effect, low, high, reason=''):
  return verdicts.Verdict(
    finding, '', 'validated', 'ratio', outcome, reason, effect, low, high
  )


def test_the_opposite_of_a_finding_looks_like_nothing_else():
  """Nor is it found where too few seeds say so."""
  picture = findings.draw(
    [
      _verdict('1', 'supported', 0.2, 0.1, 0.3),
      _verdict('2', 'not supported', -0.2, -0.5, 0.1),
      _verdict('4', 'not supported', -0.2, -0.3, -0.1),
      _verdict('5', 'not testable', -0.2, -0.3, -0.1, 'needs N ≥ 3'),
    ]
  )
  axes = picture.figure.axes
  assert [panel.get_title(loc='left') for panel in axes] == [
    'Finding 1: supported',
    'Finding 2: not supported',
    'Finding 4: not supported,\nthe opposite found',
    'Finding 5: not testable',
  ]
  assert len({panel.lines[0].get_color() for panel in axes}) == 4
  assert picture.reading == (
    'Supported: 1. Not supported: 2. Not supported, the opposite found: 4. '
    'Not testable (needs N ≥ 3): 5.'
  )


def test_no_panel_of_findings_is_blank():
  nothing = (np.nan, np.nan, np.nan)
  picture = findings.draw(
    [
      _verdict('1', 'supported', 0.2, 0.1, 0.3),
      _verdict('2', 'not testable', *nothing, 'needs two sizes'),
      _verdict('3a', 'supported', 0.2, 0.1, 0.3),
      _verdict('3b', 'not testable', *nothing, 'needs N ≥ 6'),
      _verdict('4', 'not testable', *nothing, 'needs two sizes'),
      _verdict('5', 'not supported', 0.2, -0.1, 0.3),
    ]
  )
  titles = [panel.get_title(loc='left') for panel in picture.figure.axes]
  assert [title.partition(':')[0] for title in titles] == [
    'Finding 1',
    'Finding 3a',
    'Finding 5',
  ]
  assert picture.reading.endswith(
    'Not testable (needs two sizes): 2 and 4. Not testable (needs N ≥ 6): 3b.'
  )


@pytest.mark.parametrize('seeds', [1, 3])
def test_bars_are_not_those_of_differences(seeds):
  study = made_up_grid.study(sizes={'s': 100}, ns=(2,), seeds=seeds)
  for draw in (size.draw, base_quality.draw, methods.draw, number.draw_by_size):
    assert (
      'Bars are of each mean alone; differences are paired by seed and are '
      'under Findings. '
    ) in draw(study.grid()).caption


def test_colours_are_said_again_by_marks(panels):
  """Numbers of experts, and the bases of horizontal levels."""
  ours, *_ = panels['held_in_by_size']
  by_colour = {
    (line.get_color(), line.get_marker())
    for line in ours.lines
    if len(line.get_xdata()) == len({*line.get_xdata()})
    and line.get_marker() != 'None'
  }
  assert len(by_colour) == len({mark for _, mark in by_colour}) == 4
  levels = [
    line
    for line in panels['by_number_and_size'][0].lines
    if line.get_linestyle() in ('--', ':', '-.')
  ]
  assert len(levels) == 6
  assert {line.get_marker() for line in levels} == {'o', 's'}


def test_drift_is_read_within_the_methods_that_are_tuned():
  """Averaging is nearest and worst: that alone ranks drift with held-in."""
  study = made_up_grid.study(sizes={'s': 100}, bases=['pretrained'], ns=[8])
  drifts = {'average': 0.1, 'task_arithmetic': 0.4, 'dare_ties': 0.3}
  kept = {'average': 0.1, 'task_arithmetic': 0.5, 'dare_ties': 0.6, 'ties': 0.7}
  cells = tuple(
    dataclasses.replace(
      cell,
      drift=drifts.get(cell.method, 0.2),
      scores={
        **cell.scores,
        **{task: kept[cell.method] * x for task, x in cell.expert.items()},
      },
    )
    for cell in study.cells
  )
  grid = dataclasses.replace(study, cells=cells).grid()
  # Ranks of drift 1 4 3 2, of held-in 1 2 3 4: 1 − 6 · 8 / (4 · 15). Without
  # averaging they are reversed.
  assert drift.draw(grid).reading.endswith(
    'held-in is 0.20, by size and base; over the methods that have '
    'hyperparameters alone −1.00.'
  )


def test_above_the_base_is_counted_with_intervals_as_well():
  study = made_up_grid.study(sizes={'s': 100}, bases=['pretrained'], ns=[2, 8])
  # By method: all seeds at 1.1, or one of three at 0.9.
  cells = tuple(
    dataclasses.replace(
      cell,
      scores={
        **cell.scores,
        **{
          task: (0.9 if cell.method == 'ties' and cell.seed == 0 else 1.1)
          * cell.base_scores[task]
          for task in cell.held_out
        },
      },
    )
    for cell in study.cells
  )
  grid = dataclasses.replace(study, cells=cells).grid()
  reading = number.draw_held_out(grid).reading
  assert reading.startswith('8 of 8 groups')
  assert 'held-out tasks, 6 with all of their interval' in reading


def test_costs_are_read_with_the_verdict_on_finding_4():
  """At topic nothing is lost at any size; one base fails its gate."""
  study = made_up_grid.study(failing=[('s', 'instruction-tuned', 'topic')])
  cells = tuple(
    dataclasses.replace(
      cell, scores={**cell.scores, 'topic': cell.expert['topic']}
    )
    for cell in study.cells
  )
  grid = dataclasses.replace(study, cells=cells).grid()
  # Of the pretrained base topic is one category of eight: on average over bases
  # 0.03 less is lost in 15 of 16.
  assert number.draw_by_size(grid).reading == (
    'Going from 2 to 8 experts costs 0.16 at s, 0.13 at m and 0.10 at l of '
    'held-in, mean over bases and methods. Finding 4, of what may be counted '
    'at every size for each base alone, is supported: +0.028 (+0.028 to '
    '+0.028) less lost from N = 2 to 8, per doubling; the interval lies above '
    '0.'
  )


def test_one_size_has_no_verdict_on_finding_4():
  grid = made_up_grid.study(sizes={'s': 100}, ns=(2, 4)).grid()
  assert number.draw_by_size(grid).reading.endswith(
    'Sizes cannot be compared: needs two sizes; only s was run.'
  )


def test_scores_mark_what_is_not_testable():
  study = made_up_grid.study(
    sizes={'s': 100},
    bases=['pretrained'],
    failing=[('s', 'pretrained', 'topic')],
  )
  (table,) = scores_of.tables(study)
  assert table.untestable == {'topic'}
  (panel,) = scores.draw([table]).figure.axes
  labels = [label.get_text() for label in panel.get_yticklabels()]
  assert [label for label in labels if '*' in label] == ['topic*']
  places = panel.get_yticks()
  held_in = len(made_up_grid.HELD_IN)
  steps = [*places[1:] - places[:-1]]
  assert max(steps) == steps[held_in - 1] > 1
  assert [text.get_text() for text in panel.texts] == ['held-in', 'held-out']


def test_scores_are_a_row_a_size_and_a_column_a_base():
  study = made_up_grid.study(sizes={'s': 100, 'm': 200}, ns=(2, 4))
  tables = scores_of.tables(study)
  assert len(tables) == 4
  of = [(table.size, table.base) for table in tables]
  kept = [table for table in tables if of.index((table.size, table.base)) != 1]
  figure = scores.draw(kept).figure
  assert len(figure.axes) == 3
  # Not wider than the others, so that its letters are not smaller.
  assert figure.get_figwidth() < 8
  # What stands side by side can be told apart, also without its colour.
  (legend,) = figure.legends
  grays = [
    colors.to_rgb(line.get_color())[0]
    for line in legend.get_lines()[:4]  # base, expert, multitask, averaging
  ]
  assert min(-np.diff(grays)) > 0.15


def test_a_method_joins_by_one_entry():
  """Of the table: cells, names and figures take it from there."""
  code = (
    'from experiments.scale_study.analysis import methods;'
    "methods.METHODS['dare'] = methods.Look('DARE', '#f0e442', 'v');"
    'from experiments.scale_study.analysis import figures, verdicts;'
    'from tests.experiments import made_up_grid;'
    "study = made_up_grid.study(methods=['average', 'dare']);"
    'pictures = [*figures.draw_all(study, verdicts.judge_all(study), [])];'
    "print(sum('DARE' in picture.reading for picture in pictures))"
  )
  process = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert process.returncode == 0, process.stderr
  assert int(process.stdout) > 0
