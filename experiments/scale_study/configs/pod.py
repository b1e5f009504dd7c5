"""Models that there are already, on a mesh; a template to be copied.

Write the paths of your models and of a folder of tasks (see `tasks/p3.py`) into
a copy of this file, leave out the sizes that you do not have, and run its
phases one after another, each as often as it is killed:

  for phase in bases experts multitask evaluate merge report; do
    python -m experiments.scale_study --preset=pod --output_dir=DIR \
      --phase=$phase
  done

`--set=seeds=0` begins with one seed, and `--part` does one size and seed, its
bases first; the same folder takes the others later, and the report is about
what is done:

  for part in 1b/0 1b/pretrained/0 1b/instruction-tuned/0; do
    python -m experiments.scale_study --preset=pod --output_dir=DIR \
      --part=$part
  done

`bases` copies the models, which are Hugging Face's or, with a `shape`, Orbax
checkpoints of this study's layout, into Orbax checkpoints. Of Hugging Face's
they may be Qwen 2.5, or Llama up to 3.0: those of 3.1 and later, whose rotary
positions are scaled (`rope_scaling`), are refused. All sizes have the
vocabulary of one tokenizer. Several hosts run the same command with
`--distributed` and need DIR on a file system that they share. Nothing of these
sizes was ever run: `compile_pod.py` compiles them, and a test runs the preset
on models of a few thousand parameters.

Verdicts want three seeds, and those on size two sizes or more. Finished models
keep the statistics of AdamW beside their parameters, three times the disk: 12
GB each at 1B, 768 GB at 64B. A seed has 16 experts and two multitask models of
both bases: 0.2, 1.7, 5.2 and 13.8 TB at the four sizes, 63 TB with all seeds.

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
  tokenizer='models/1b/tokenizer.json',
  # Those of Yadav et al. (2024, arXiv 2410.03617).
  sizes={
    name: Stored(
      pretrained=f'models/{name}', instruction_tuned=f'models/{name}-instruct'
    )
    for name in ('1b', '8b', '24b', '64b')
  },
  seeds=(0, 1, 2),
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
