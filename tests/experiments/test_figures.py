"""The paper's own figures stand beside those of a study."""

import subprocess
import sys

import pytest

from experiments.scale_study.analysis import figures, verdicts
from experiments.scale_study.analysis.figures import (
  base_quality,
  drift,
  methods,
  number,
  size,
  sweep,
)
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


def test_methods_compared(panels):
  """Held-in 0.93 by every method, held-out 1.09 to 1.10, at 64B."""
  *_, held_in, held_out = panels['methods_compared']
  assert (0.93, 0.93) in curves(held_in)
  assert (1.09, 1.10) in curves(held_out)


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
  assert 'ratio: sentiment, word sense and topic. ' in said['both']
  assert 'ratio: sentiment and topic.' in said['drift']
  assert 'ratio: word sense. ' in said['held-out']
  # Of both bases at the largest size alone, which nothing else fails at.
  assert 'ratio: topic. ' in said['methods']
  held_in = 'ratio: sentiment ({}) and topic ({}). '
  assert (
    held_in.format(
      's, pretrained; s, instruction-tuned',
      'm, pretrained; m, instruction-tuned',
    )
    in said['base']
  )
  at_both = 's, pretrained; m, pretrained'
  assert held_in.format(at_both, at_both) in said['size']


def test_a_sweep_varies_one_hyperparameter_alone():
  study = made_up_grid.study(
    sizes={'s': 100}, bases=['pretrained'], ns=[2], seeds=1, sweeps=True
  )
  for picture in sweep.draw_all(study):
    assert 'the other hyperparameters are fixed' in picture.caption
    assert 'chosen on the dashed curves' not in picture.caption


def test_a_method_joins_by_one_entry():
  """Of the table: cells, names and figures take it from there."""
  code = (
    'from experiments.scale_study.analysis import methods;'
    "methods.METHODS['dare'] = methods.Method('DARE', '#f0e442', 'v');"
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
