r"""A real language model on two cores: SmolLM2-135M-Instruct on real texts.

  pip install -e '.[study,real]' && apt-get install wordnet-base
  python -m experiments.scale_study --preset=smollm2

The model (98 MB) and the texts are fetched and kept in `~/.cache`. Everything
is cut until three seeds take an hour: a step of an expert costs 2 to 3 CPU
seconds and 64 questions 3 to 4.5. So an expert has 50 steps; a task has 64 test
questions, which makes a standard error of up to 0.06; and there are sixteen
merges of a subset and, at N = 2, two pairs. The package has no pretrained base,
and other sizes do not fit.

There are eight categories. More of them are a flag, as all are here, for which
the multitask model has twice the steps:

  --set=categories=multiple_choice_qa,extractive_qa,closed_book_qa,sentiment,\
topic_classification,structure_to_text,summarization,paraphrase_identification \
  --set=merged=2,4,8 --set=multitask_steps=200

It took 1,400 CPU seconds a seed and 11 GB of memory, and made
`experiments/results/smollm2`. Accuracy, the mean of three seeds, held-in and
held-out (sentence completion): base 0.36 and 0.83, experts 0.82 on their own
tasks, multitask 0.83 and 0.86, and of the merges of all four 0.69 and 0.83
(average), 0.79 and 0.84 (task arithmetic), 0.79 and 0.83 (Dare-TIES), 0.78 and
0.81 (TIES).
"""

from experiments.scale_study.study_config import (
  MethodGrid,
  Stored,
  StudyConfig,
)
from experiments.scale_study.tasks.real import LENGTH

CONFIG = StudyConfig(
  tasks='real',
  categories=(
    'multiple_choice_qa',
    'closed_book_qa',
    'sentiment',
    'topic_classification',
  ),
  sizes={'135m': Stored(instruction_tuned='smollm2')},
  bases=('instruction-tuned',),
  seeds=(0, 1, 2),
  length=LENGTH,
  batch=8,
  # One chunk: other numbers of steps compile another program.
  expert_steps=50,
  expert_rates=(5e-5,),
  multitask_steps=100,
  multitask_rate=5e-5,
  direct_steps=0,
  validation_examples=64,
  test_examples=64,
  merged=(2, 4),
  subsets=2,
  methods={
    'average': MethodGrid(),
    'task_arithmetic': MethodGrid({'scale': 0.4}, {'scale': (0.4, 0.8, 1.2)}),
    'ties': MethodGrid(
      {'density': 0.2, 'scale': 1.0},
      {'density': (0.2, 0.5), 'scale': (1.0, 2.0, 3.0)},
    ),
    'dare_ties': MethodGrid(
      {'drop_rate': 0.5, 'scale': 0.6},
      {'drop_rate': (0.5, 0.9), 'scale': (0.6, 1.2, 2.0)},
    ),
  },
  sweeps={},
  # Sixteen merges of half a gigabyte each lie beside it.
  memory_budget='2GiB',
)
