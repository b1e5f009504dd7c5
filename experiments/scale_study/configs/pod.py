"""Models that there are already, on a mesh; a template to be copied.

Write the paths of your models and of a folder of tasks (see `tasks/p3.py`) into
a copy of this file, and run its phases one after another, each as often as it
is killed:

  for phase in bases experts multitask evaluate merge report; do
    python -m experiments.scale_study --preset=pod --output_dir=DIR \
      --phase=$phase
  done

`bases` copies the models, which are Hugging Face's or, with a `shape`, Orbax
checkpoints of this study's layout, into Orbax checkpoints. Of Hugging Face's
they may be Qwen 2.5, or Llama up to 3.0: those of 3.1 and later, whose rotary
positions are scaled (`rope_scaling`), are refused. Several hosts run the same
command with `--distributed` and need DIR on a file system that they share.
Nothing of this size was ever run: `compile_pod.py` compiles it, and
a test runs the preset on models of a few thousand parameters.

One seed and one size conclude nothing: verdicts want three seeds
(`seeds=(0, 1, 2)`), and those on size a second entry of `sizes`. Finished
models keep the statistics of AdamW beside their parameters, three times the
disk: 96 GB each at 8B, 1.7 TB of the 16 experts and two multitask models of
both bases and a seed.

Other than in Yadav et al. (2024, arXiv 2410.03617) there is no dropout (theirs
is 0.05), the rate warms up over 5 % of the steps and falls as a cosine to 5 %,
b2 of AdamW is 0.98, prompts have no chat template, an end token is learned
behind every answer, and exact match does not normalise texts.
"""

from experiments.scale_study.study_config import (
  Gates,
  MethodGrid,
  Stored,
  StudyConfig,
)

CONFIG = StudyConfig(
  tasks='data/p3',
  tokenizer='models/8b/tokenizer.json',
  sizes={
    '8b': Stored(
      pretrained='models/8b', instruction_tuned='models/8b-instruct'
    ),
  },
  length=1024,
  batch=64,
  # Yadav et al. (2024, arXiv 2410.03617).
  expert_steps=2000,
  expert_rates=(3e-5,),
  multitask_steps=2000,
  multitask_rate=3e-5,
  direct_steps=0,
  validation_examples=128,
  test_examples=512,
  text_metric='rouge_l',
  gates=Gates(gain=None),
  methods={
    'average': MethodGrid(),
    'task_arithmetic': MethodGrid({'scale': 0.35}, {'scale': (0.2, 0.35, 0.5)}),
    'ties': MethodGrid(
      {'density': 0.2, 'scale': 1.0},
      {'density': (0.1, 0.2), 'scale': (0.6, 1.0)},
    ),
    'dare_ties': MethodGrid(
      {'drop_rate': 0.5, 'scale': 0.6},
      {'drop_rate': (0.5, 0.8), 'scale': (0.35, 0.6)},
    ),
  },
  sweeps={},
  remat=True,
  compute_dtype='bfloat16',
  mesh={'data': 1, 'fsdp': 32, 'tensor': 8},
  memory_budget='16GiB',
)
