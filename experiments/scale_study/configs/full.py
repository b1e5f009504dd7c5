"""The study at four sizes and three seeds, for hours on two cores.

  python -m experiments.scale_study --preset=full

It goes on where it was killed, and one seed of it is `--set=seeds=0`. Experts
are merged by themselves as well (N = 1): three numbers of experts up to 4 are
what the merging law needs for its b, and for an R² at each size.

What it takes grows with the size, so it may be run part by part; the report is
about what is done:

  for part in s/0 s/pretrained/0 s/instruction-tuned/0; do
    python -m experiments.scale_study --preset=full --part=$part; done
  python -m experiments.scale_study --preset=full --phase=report

A seed of s takes about 1,070 CPU seconds, of m 2,670, of l and of xl 5,000. All
of it made `experiments/results/full`: 588 of 600 gates pass, and all five
findings get a verdict; at N = 8, mean over methods and bases and over the
categories that pass everywhere, held-in was 0.26 of the expert for s, 0.39 for
m, 0.43 for l and 0.41 for xl, held-out 1.17, 1.39, 1.40 and 1.29 of the base.
"""

from experiments.scale_study.study_config import (
  MethodGrid,
  Scratch,
  StudyConfig,
)

CONFIG = StudyConfig(
  sizes={
    's': Scratch(width=64, layers=2, heads=4),
    'm': Scratch(width=96, layers=3, heads=4),
    'l': Scratch(width=144, layers=4, heads=4),
    'xl': Scratch(width=208, layers=4, heads=8),
  },
  seeds=(0, 1, 2),
  merged=(1, 2, 4, 6, 8),
  # The first that learns a task is not the first that keeps the others.
  expert_rates=(5e-4, 1e-3),
  methods={
    'average': MethodGrid(),
    'task_arithmetic': MethodGrid(
      {'scale': 0.35}, {'scale': (0.2, 0.35, 0.5, 0.7, 1.0, 1.4)}
    ),
    'ties': MethodGrid(
      {'density': 0.2, 'scale': 1.0},
      {'density': (0.1, 0.2, 0.5), 'scale': (0.5, 1.0, 1.5, 2.0)},
    ),
    'dare_ties': MethodGrid(
      {'drop_rate': 0.5, 'scale': 0.6},
      {'drop_rate': (0.2, 0.5, 0.8), 'scale': (0.35, 0.6, 1.0, 1.4)},
    ),
  },
  sweeps={
    'task_arithmetic': {'scale': (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)},
    'ties': {
      'scale': (0.5, 1.0, 1.5, 2.0, 3.0),
      'density': (0.05, 0.1, 0.2, 0.4, 0.8),
    },
    'dare_ties': {'drop_rate': (0.1, 0.3, 0.5, 0.7, 0.9)},
  },
  processes=2,
)
