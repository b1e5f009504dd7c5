"""Every figure of the report, in its order."""

from collections.abc import Iterator, Sequence
import math

from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.figures import (
  base_quality,
  drift,
  findings,
  merging_law,
  methods,
  number,
  scores,
  size,
  sweep,
)
from experiments.scale_study.analysis.figures.picture import Picture
from experiments.scale_study.analysis.law import Fit
from experiments.scale_study.analysis.scores import tables as scores_of
from experiments.scale_study.analysis.verdicts import Verdict


def draw_all(
  results: Results, verdicts: Sequence[Verdict], fits: Sequence[Fit]
) -> Iterator[Picture]:
  """Draws scores, findings, the paper's figures, then sweeps, drift, law.

  What compares bases or sizes is left out where there is one, and so are the
  findings where none has an effect, and held-out tasks where there are none.
  """
  tables = scores_of(results)
  if tables:
    yield scores.draw(tables)
  if any(not math.isnan(verdict.effect) for verdict in verdicts):
    yield findings.draw(verdicts)
  grid = results.grid()
  if grid.cells:
    if len(grid.bases) > 1:
      yield base_quality.draw(grid)
    if len(grid.sizes) > 1:
      yield size.draw(grid)
    if grid.has_held_out:
      yield number.draw_held_out(grid)
    yield number.draw_by_size(grid)
    yield methods.draw(grid)
  yield from sweep.draw_all(results)
  if grid.cells:
    yield drift.draw(grid)
  law = merging_law.draw(results, fits)
  if law is not None:
    yield law
