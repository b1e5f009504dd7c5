"""A figure with what it shows and a reading of it, computed from the data."""

from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.aggregate import Study
from experiments.scale_study.analysis.bootstrap import Estimate, MINIMUM_SEEDS


class Picture(NamedTuple):
  """A figure of the report.

  Attributes:
    name: of its file.
    heading: above it.
    reading: what the numbers say, in plain words.
    caption: how to look at it.
    figure: the picture.
  """

  name: str
  heading: str
  reading: str
  caption: str
  figure: Figure


def bars(study: Study) -> str:
  """Says what the bars of a study's figures are."""
  seeds = len(study.seeds)
  if seeds >= MINIMUM_SEEDS:
    return f'Bars are 95 % intervals over {seeds} seeds.'
  word = 'one seed was' if seeds == 1 else f'only {seeds} seeds were'
  return (
    f'Bars are 95 % intervals over subsets alone: {word} run, so that nothing '
    'is known about others. Where there is one subset there is no bar.'
  )


def left_out(study: Study) -> str:
  """Says what does not count where sizes or bases are compared."""
  failed = dict.fromkeys(e.category for e in study.exclusions)
  if not failed:
    return ''
  listed = names.join(name.replace('_', ' ') for name in failed)
  return f'Not counted where a side of a comparison fails its gates: {listed}. '


def at(series: Estimate, *index) -> tuple[float, float, float]:
  """Returns one estimate of an array of them."""
  return (
    float(series.value[index]),
    float(series.low[index]),
    float(series.high[index]),
  )


def part(series: Estimate, *index) -> Estimate:
  """Returns some of an array of estimates."""
  return Estimate(*(bound[index] for bound in series))
