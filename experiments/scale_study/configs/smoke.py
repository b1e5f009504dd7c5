"""The whole pipeline in little time, on 8 simulated devices of a CPU.

  python -m experiments.scale_study --preset=smoke

Mean test accuracy over the 4 tasks, chance 0.247, by --seed:

  seed  base   expert  average  task_arithmetic  ties   dare_ties
  0     0.261  0.931   0.514    0.562            0.450  0.525
  1     0.323  0.999   0.574    0.626            0.554  0.556
  2     0.309  0.860   0.514    0.579            0.549  0.561

The least gain of an expert over the base was +0.390 (topic, seed 1). Merges
keep a good part where candidates are ranked; structure_to_text, where every
word has to match, falls to 0.00-0.06. On two cores it takes 57 s; 75-130 s
where other work shares them.
"""

from experiments.scale_study.config import StudyConfig

CONFIG = StudyConfig(
  host_devices=8,
  width=48,
  layers=2,
  heads=4,
  length=36,
  batch=16,
  pretrain_steps=1000,
  pretrain_rate=4e-3,
  expert_steps=200,
  expert_rate=1e-3,
  test_examples=200,
  methods={
    'average': {},
    'task_arithmetic': {'scale': 0.5},
    'ties': {'density': 0.2, 'scale': 1.0},
    'dare_ties': {'drop_rate': 0.5, 'scale': 0.6},
  },
)
