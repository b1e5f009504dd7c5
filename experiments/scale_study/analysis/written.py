"""What models write, by exact match and by ROUGE-L, from `rouge_l.csv`.

A merge that writes nearly the right sentence scores 0 by exact match, which is
what gates, ratios and verdicts take.
"""

from collections.abc import Iterator
import csv
from pathlib import Path
import statistics
from typing import NamedTuple

from experiments.scale_study.analysis.methods import METHODS

_MODELS = ('base', 'expert', 'multitask', *METHODS)


class Written(NamedTuple):
  """A model of an arm on all tasks that are written, mean over seeds.

  Attributes:
    size: of the model.
    base: that it was made from.
    model: 'base', 'expert', 'multitask' or the method of a merge of all.
    exact: share of answers that match exactly.
    rouge_l: their ROUGE-L (Lin, 2004).
  """

  size: str
  base: str
  model: str
  exact: float
  rouge_l: float


def load(folder: Path) -> list[Written]:
  """Reads the means over tasks and seeds; nothing if there is no such file."""
  file = folder / 'rouge_l.csv'
  if not file.exists():
    return []
  with file.open(newline='', encoding='utf-8') as lines:
    return list(_means(list(csv.DictReader(lines))))


def _means(rows: list[dict[str, str]]) -> Iterator[Written]:
  arms = dict.fromkeys((row['size'], row['base']) for row in rows)
  for size, base in arms:
    for model in _MODELS:
      own = [
        (float(row['score']), float(row['rouge_l']))
        for row in rows
        if (row['size'], row['base'], row['model']) == (size, base, model)
      ]
      if own:
        yield Written(
          size, base, model, *map(statistics.fmean, zip(*own, strict=True))
        )
