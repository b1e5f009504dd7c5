"""A study of a few seconds, on a folder of tasks; run, it is killed.

python -m tests.experiments.small_study TASKS RESULTS
"""

import dataclasses
import itertools
import json
import os
from pathlib import Path
import signal
import sys

from experiments.scale_study import size
from experiments.scale_study.folder import Arm
from experiments.scale_study.study import Study
from experiments.scale_study.study_config import (
  MethodGrid,
  Scratch,
  StudyConfig,
)
from experiments.scale_study.tasks.source import Source

FLAGS = ['--preset=small']
ARM = Arm('xs', 'instruction-tuned', 0)
COLOURS = ('red', 'blue', 'green', 'white')
# The training in which a study that is to be killed dies: in its second arm.
LAST = 9


def write_tasks(folder: Path) -> None:
  """Writes two held-in categories, a held-out one, and what comes before."""

  def line(category, prompt, answer, choices=()):
    return {
      'inputs': prompt,
      'targets': answer,
      'answer_choices': list(choices),
      'category': category,
      'dataset': f'{category}_in_colours',
      'template': 'plain',
    }

  folder.mkdir()
  pairs = list(itertools.product(COLOURS, repeat=3))
  for number, split in enumerate(('train', 'validation', 'test')):
    with (folder / f'{split}.jsonl').open('w') as file:
      for one, two, three in pairs[number::3]:
        words = f'{one} {two} {three}'
        for record in (
          line('sentiment', f'{words} ?', one, COLOURS),
          line('structure_to_text', f'{words} .', f'{three} {two}'),
          line('sentence_completion', f'{words} and', two, COLOURS),
          line('instruction', f'{words} !', three),
        ):
          file.write(json.dumps(record) + '\n')
  with (folder / 'corpus.jsonl').open('w') as file:
    for words in pairs:
      file.write(json.dumps({'text': ' '.join(words)}) + '\n')


def config(tasks: Path, **changes) -> StudyConfig:
  """Returns the preset; every training is one chunk of steps."""
  settings = dict(
    tasks=str(tasks),
    sizes={'xs': Scratch(width=16, layers=1, heads=2)},
    corpus_length=12,
    length=12,
    batch=8,
    pretrain_steps=50,
    instruction_steps=50,
    expert_steps=50,
    expert_rates=(1e-2,),
    multitask_steps=50,
    direct_steps=50,
    validation_examples=8,
    test_examples=8,
    merged=(2, 4),
    methods={
      'average': MethodGrid(),
      'ties': MethodGrid(
        {'density': 0.5, 'scale': 1.0},
        {'density': (0.5, 0.9), 'scale': (0.5, 1.0)},
      ),
    },
    sweeps={'ties': {'density': (0.5, 0.8)}},
  )
  return StudyConfig(**{**settings, **changes})


def study(results: Path, tasks: Path, **changes) -> Study:
  """Returns the study of a preset in a folder."""
  return Study(config(tasks, **changes), results, FLAGS)


def without_examples(source: Source, category: str, split: str) -> Source:
  """Returns tasks of which a category lacks the examples of a split."""

  def emptied(dataset):
    def examples(of, seed):
      return iter(()) if of == split else dataset.examples(of, seed)

    return dataclasses.replace(dataset, examples=examples)

  side = 'held_in' if category in source.held_in else 'held_out'
  datasets = dict(getattr(source, side))
  datasets[category] = tuple(map(emptied, datasets[category]))
  return dataclasses.replace(source, **{side: datasets})


def main(tasks: Path, results: Path) -> None:
  trainings = itertools.count()
  train = size.train

  def deadly(*args, **options):
    if next(trainings) == LAST:
      os.kill(os.getpid(), signal.SIGKILL)
    return train(*args, **options)

  size.train = deadly
  study(results, tasks).run()


if __name__ == '__main__':
  main(Path(sys.argv[1]), Path(sys.argv[2]))
