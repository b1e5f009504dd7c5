"""The whole study in little time: one base, four experts, a mesh of 2 devices.

  python -m experiments.scale_study --preset=smoke

A device is half of the model, on simulated devices of a CPU. Part of the test
examples answered correctly with 4 experts merged, of seed 0:

                        base  expert  average  task_arithmetic  dare_ties  ties
  multiple_choice_qa    0.35  0.94    0.51     0.57             0.48       0.52
  closed_book_qa        0.00  0.97    0.01     0.21             0.00       0.00
  topic_classification  0.35  0.89    0.81     0.72             0.78       0.61
  structure_to_text     0.00  0.92    0.00     0.00             0.00       0.00
  mean                  0.18  0.93    0.33     0.37             0.31       0.28

With 2 of them the means are 0.56, 0.56, 0.52 and 0.46. Merges keep much where
candidates are ranked, and little where every word has to match.
"""

from experiments.scale_study.study_config import (
  MethodGrid,
  Scratch,
  StudyConfig,
)

CONFIG = StudyConfig(
  categories=(
    'multiple_choice_qa',
    'closed_book_qa',
    'topic_classification',
    'structure_to_text',
  ),
  sizes={'xs': Scratch(width=64, layers=2, heads=4)},
  # Of some categories there are no instruction tasks.
  bases=('pretrained',),
  corpus_length=40,
  batch=16,
  pretrain_steps=1300,
  pretrain_rate=5e-3,
  expert_steps=200,
  expert_rates=(3e-3,),
  multitask_steps=200,
  multitask_rate=2e-3,
  direct_steps=0,
  validation_examples=16,
  test_examples=64,
  merged=(2, 4),
  subsets=2,
  methods={
    'average': MethodGrid(),
    'task_arithmetic': MethodGrid({'scale': 0.5}),
    'ties': MethodGrid({'density': 0.2, 'scale': 1.0}),
    'dare_ties': MethodGrid({'drop_rate': 0.5, 'scale': 0.6}),
  },
  sweeps={},
  mesh={'data': 1, 'fsdp': 2, 'tensor': 1},
  host_devices=2,
  strict=True,
)
