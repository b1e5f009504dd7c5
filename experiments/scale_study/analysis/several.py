"""Several findings at once: what Holm's correction leaves of them.

Verdicts are each for itself. Of six effects that are all 0, one or more would
be called supported in up to 15 % of studies, if each is in 2.5 %. Holm (1979)
keeps that below the level for all together, whatever they share: the smallest
p value is multiplied by the number of effects, the next by one less, and so on.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from experiments.scale_study.analysis.bootstrap import MINIMUM_SEEDS
from experiments.scale_study.analysis.verdicts import Verdict


class Corrected(NamedTuple):
  """P values of Student's t of the effects with each seed alone.

  Attributes:
    finding: its number.
    alone: one-sided, for an effect above 0, of this finding alone.
    one_sided: the same by Holm's correction.
    two_sided: for an effect other than 0, by Holm's correction.
  """

  finding: str
  alone: float
  one_sided: float
  two_sided: float


def corrected(judged: Iterable[Verdict]) -> list[Corrected]:
  """Corrects the verdicts themselves, of three seeds or more."""
  chosen = [
    v
    for v in judged
    if v.is_main and v.finding != '3' and len(v.by_seed) >= MINIMUM_SEEDS
  ]
  ways = [
    [_p(verdict.by_seed, alternative) for verdict in chosen]
    for alternative in ('greater', 'two-sided')
  ]
  one_sided, two_sided = map(holm, ways)
  findings = [verdict.finding for verdict in chosen]
  rows = zip(findings, ways[0], one_sided, two_sided, strict=True)
  return [Corrected(*row) for row in rows]


def holm(p: Sequence[float]) -> list[float]:
  """Returns p values that are corrected for their number."""
  order = np.argsort(p)
  factors = np.arange(len(p), 0, -1)
  raised = np.maximum.accumulate(np.array(p, float)[order] * factors)
  result = np.empty(len(p))
  result[order] = np.minimum(raised, 1)
  return result.tolist()


def _p(values: Sequence[float], alternative: str) -> float:
  tested = scipy.stats.ttest_1samp(values, 0, alternative=alternative)
  return float(np.asarray(tested)[1])
