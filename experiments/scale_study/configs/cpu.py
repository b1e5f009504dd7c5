"""All of the study on two cores of a CPU, with two sizes and one seed.

  python -m experiments.scale_study --preset=cpu

A seed takes about 940 CPU seconds: 10 minutes on two cores. With six, by
`--set=seeds=0,1,2,3,4,5`, it made `experiments/results/cpu`: 1,659 different
merges; 27 of 600 gates failed; at N = 8, mean over methods and bases and over
the categories that pass everywhere, held-in was 0.34 of the expert for s and
0.42 for m, held-out 1.22 and 1.29 of the base.

Experts are not merged by themselves, as `full` does for the merging law: that
would be 8 subsets to merge and to score beside the 10 that there are.
"""

from experiments.scale_study.study_config import (
  MethodGrid,
  Scratch,
  StudyConfig,
)

CONFIG = StudyConfig(
  sizes={
    's': Scratch(width=64, layers=2, heads=4),
    'm': Scratch(width=96, layers=2, heads=4),
  },
  pretrain_steps=3000,
  instruction_steps=600,
  expert_steps=300,
  expert_rates=(1e-3,),
  multitask_steps=600,
  direct_steps=200,
  validation_examples=32,
  test_examples=64,
  methods={
    'average': MethodGrid(),
    'task_arithmetic': MethodGrid(
      {'scale': 0.35}, {'scale': (0.2, 0.35, 0.6, 1.0)}
    ),
    'ties': MethodGrid(
      {'density': 0.2, 'scale': 1.0},
      {'density': (0.2, 0.5, 0.8), 'scale': (0.6, 1.0, 1.5)},
    ),
    'dare_ties': MethodGrid(
      {'drop_rate': 0.5, 'scale': 0.6},
      {'drop_rate': (0.1, 0.3, 0.5), 'scale': (0.6, 1.0, 1.5)},
    ),
  },
  sweeps={
    'task_arithmetic': {'scale': (0.1, 0.2, 0.35, 0.6, 1.0)},
    'ties': {'density': (0.05, 0.2, 0.6)},
  },
  processes=2,
)
