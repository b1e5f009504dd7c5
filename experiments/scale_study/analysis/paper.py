"""Figures of the paper, to be seen beside one's own.

Yadav et al., 2025, What Matters for Model Merging at Scale? arXiv 2410.03617:
task arithmetic at 2 and at 8 experts, and its multitask models. Its tables do
not give intervals.
"""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.scale_study.analysis.bases import Base

CITATION = 'Yadav et al., arXiv 2410.03617, task arithmetic'

SIZES: Mapping[str, float] = {'1B': 1e9, '8B': 8e9, '24B': 24e9, '64B': 64e9}


class Row(NamedTuple):
  """One base and size: (N = 2, N = 8), then the multitask model."""

  base: Base
  size: str
  held_in: tuple[float, float]
  held_in_multitask: float
  held_out: tuple[float, float]
  held_out_multitask: float


NS = (2, 8)

ROWS = (
  Row('pretrained', '1B', (0.66, 0.39), 0.87, (1.01, 1.07), 1.10),
  Row('pretrained', '8B', (0.68, 0.42), 1.06, (1.06, 1.00), 1.62),
  Row('pretrained', '64B', (0.80, 0.67), 0.96, (1.29, 1.35), 1.72),
  Row('instruction-tuned', '1B', (0.91, 0.86), 0.96, (1.03, 1.05), 1.11),
  Row('instruction-tuned', '8B', (0.95, 0.88), 0.96, (1.06, 1.03), 1.12),
  Row('instruction-tuned', '24B', (0.96, 0.92), 0.98, (1.05, 1.18), 1.18),
  Row('instruction-tuned', '64B', (1.00, 0.93), 0.99, (1.00, 1.09), 1.05),
)

# All four methods at 64B, instruction-tuned, N = 8: from the least to the most.
METHODS_HELD_IN = (0.93, 0.93)
METHODS_HELD_OUT = (1.09, 1.10)
