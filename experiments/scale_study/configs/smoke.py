"""The whole pipeline in little time, on 8 simulated devices of a CPU.

  python -m experiments.scale_study --preset=smoke

Mean test accuracy over the 4 tasks, chance 0.247, by --seed:

  seed  base   expert  average  task_arithmetic  ties   dare_ties
  0     0.276  0.843   0.440    0.526            0.460  0.447

The least gain of an expert over the base is +0.485 (sentiment). Merges keep a
good part where candidates are ranked; structure_to_text, where every word has
to match, falls to 0.00. It takes 71 CPU seconds; how many of the clock depends
on what else the cores do.
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
