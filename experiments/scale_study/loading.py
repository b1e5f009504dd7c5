"""The tasks of a preset, looked at before anything is trained on them."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import itertools
import json
import statistics
from typing import Any

from absl import logging

from experiments.scale_study import metrics, subword
from experiments.scale_study.study_config import (
  INSTRUCTION_TUNED,
  PRETRAINED,
  Scratch,
  StudyConfig,
)
from experiments.scale_study.tasks import batches, guessing
from experiments.scale_study.tasks.source import (
  Dataset,
  demand_held_in,
  HELD_IN,
  Source,
  Split,
)

# Training examples that are made as they are drawn, without end, are looked at
# up to this number of a dataset; of those in a file all are.
_TRAINING_EXAMPLES = 500


def load_source(config: StudyConfig) -> Source:
  """Returns the tasks of a preset.

  Raises:
    ValueError: if there are no such tasks, what they are made of is not
      installed, there are none for experts or for instruction tuning, too few
      for any merge of the preset, a dataset lacks examples that it needs, or
      some are longer than the rows of the preset.
  """
  try:
    source = _tasks(config)
    if config.tokenizer:
      tokenizer: Any = subword.Subwords(config.tokenizer)
      source = dataclasses.replace(source, tokenizer=tokenizer)
  except (FileNotFoundError, ImportError) as error:
    raise ValueError(f'{error}') from error
  scratch = any(isinstance(size, Scratch) for size in config.sizes.values())
  tuned = scratch and INSTRUCTION_TUNED in config.bases
  if tuned and not source.instruction:
    raise ValueError(
      f'The tasks {config.tasks!r} have none for instruction tuning'
      + (
        f' with {len(config.categories)} of the {len(HELD_IN)} categories, '
        f'only with all: take --set=categories={",".join(HELD_IN)} or '
        if config.tasks == 'procedural'
        else ': take '
      )
      + f'--set=bases={PRETRAINED}.'
    )
  _demand_experts(config, source)
  directly = direct(config, source)
  skipped = [name for name in source.held_out if name not in directly]
  if config.direct_steps and skipped:
    logging.warning(
      'No gate asks whether direct training can learn %s, which has datasets '
      'without training examples. Give them some, or take '
      '--set=direct_steps=0.',
      ', '.join(skipped),
    )
  _demand_examples(config, source, directly, tuned)
  source = _scored_by_rouge_l(config, source)
  _warn_of_gates(config, source, directly)
  return source


def digest(config: StudyConfig, source: Source) -> str:
  """Digests what models are chosen and judged on: 16 hexadecimal digits.

  It is of the questions, their answers, and the tokens of the prompts, by which
  another tokenizer is noticed. No seed is in it.
  """
  total = hashlib.blake2b(digest_size=8)
  splits: Sequence[tuple[Split, int, Mapping[str, tuple[Dataset, ...]]]] = (
    ('validation', config.validation_examples, source.held_in),
    ('test', config.test_examples, source.categories),
  )
  for split, examples, categories in splits:
    for dataset in itertools.chain(*categories.values()):
      total.update(f'{split}/{dataset.category}/{dataset.name}\n'.encode())
      for example in itertools.islice(dataset.examples(split, 0), examples):
        ids = source.tokenizer.encode(example.prompt)
        total.update(f'{json.dumps([*example, ids])}\n'.encode())
  return total.hexdigest()


def direct(
  config: StudyConfig, source: Source
) -> Mapping[str, tuple[Dataset, ...]]:
  """Returns the held-out categories that models are trained on for the gates.

  What is only tested need not have training examples.
  """
  if not config.direct_steps:
    return {}
  return {
    category: datasets
    for category, datasets in source.held_out.items()
    if all(dataset.has('train') for dataset in datasets)
  }


def _demand_experts(config: StudyConfig, source: Source) -> None:
  """Raises ValueError if there is nothing to merge; says what is not merged."""
  there_are = len(source.held_in)
  if not source.held_in:
    raise ValueError(
      f'The tasks {config.tasks!r} have no held-in category, so that there is '
      f'no expert to train. Give examples of one of {", ".join(HELD_IN)}.'
    )
  if not any(1 < n <= there_are for n in config.merged):
    remedy = 'give examples of another'
    if there_are > 1:
      remedy = f'take --set=merged={there_are}'
    raise ValueError(
      f'merged is {config.merged}, but there are only {there_are} held-in '
      f'categories to merge the experts of, {", ".join(source.held_in)}: '
      f'{remedy}.'
    )
  too_many = [n for n in config.merged if n > there_are]
  if too_many:
    logging.warning(
      'There are %d held-in categories: nothing is merged of N = %s.',
      there_are,
      ', '.join(map(str, too_many)),
    )


def _demand_examples(
  config: StudyConfig,
  source: Source,
  directly: Mapping[str, tuple[Dataset, ...]],
  tuned: bool,
) -> None:
  """Raises ValueError if what models are trained or scored on does not do."""

  def demand(datasets, split, examples):
    batches.demand(
      datasets,
      source.tokenizer,
      split=split,
      examples=examples,
      length=config.length,
    )

  for held_in in source.held_in.values():
    demand(held_in, 'train', _TRAINING_EXAMPLES)
    demand(held_in, 'validation', config.validation_examples)
  for trained in (*directly.values(), source.instruction if tuned else ()):
    demand(trained, 'train', _TRAINING_EXAMPLES)
  for tested in source.categories.values():
    demand(tested, 'test', config.test_examples)


def _scored_by_rouge_l(config: StudyConfig, source: Source) -> Source:
  """Sets the chance of what has ROUGE-L as its score, if any has."""
  if config.text_metric != 'rouge_l':
    return source

  def measured(dataset: Dataset) -> Dataset:
    if dataset.metric != 'rouge_l':
      return dataset
    count = config.test_examples
    asked = itertools.islice(dataset.examples('test', 0), count)
    wordless = [one.answer for one in asked if not metrics.words(one.answer)]
    if wordless:
      logging.warning(
        '%s: ROUGE-L compares words, and %d test answers have none, such as '
        '%r. Only the same text scores there.',
        dataset.name,
        len(wordless),
        wordless[0],
      )
    reached = guessing.constant_rouge_l(dataset, count)
    return dataclasses.replace(dataset, constant=reached)

  held_in, held_out = (
    {name: tuple(map(measured, datasets)) for name, datasets in side.items()}
    for side in (source.held_in, source.held_out)
  )
  return dataclasses.replace(source, held_in=held_in, held_out=held_out)


def _warn_of_gates(
  config: StudyConfig,
  source: Source,
  directly: Mapping[str, tuple[Dataset, ...]],
) -> None:
  """Says which gates no model can pass, as there is nothing above a guess."""
  gates, trained = config.gates, {*source.held_in, *directly}
  for category, datasets in source.categories.items():
    chances = {one.name: _chance(one, config.test_examples) for one in datasets}
    chance = statistics.fmean(chances.values())
    above = max(
      gates.learnable if category in trained else 0.0,
      gates.transfer if category in source.held_out else 0.0,
    )
    said = ', '.join(f'{name} {value:.2f}' for name, value in chances.items())
    logging.info('%s: chance is %s.', category, said)
    if chance + above > 1 + 1e-9:
      logging.warning(
        '%s cannot pass its gates: a model has to be %s above chance, which is '
        '%.2f (%s). Make the answers of its test more even, leave it out, or '
        'ask for less in gates of the preset.',
        category,
        above,
        chance,
        said,
      )


def _chance(dataset: Dataset, examples: int) -> float:
  """What `Examination.chance` will say, which needs the models."""
  asked = itertools.islice(dataset.examples('test', 0), examples)
  guessed = statistics.fmean(example.chance for example in asked)
  return max(guessed, dataset.constant)


def _tasks(config: StudyConfig) -> Source:
  # Imported only where they are wanted: each builds its vocabulary.
  if config.tasks == 'procedural':
    from experiments.scale_study.tasks import procedural

    return procedural.source(config.categories)
  if config.tasks == 'wordnet':
    from experiments.scale_study.tasks import wordnet

    return _of_categories(config, wordnet.source())
  if config.tasks == 'real':
    from experiments.scale_study.tasks import real

    return real.source(categories=config.categories)
  from experiments.scale_study.tasks import p3

  return _of_categories(config, p3.source(config.tasks))


def _of_categories(config: StudyConfig, source: Source) -> Source:
  """Leaves out held-in categories that a preset does not name."""
  demand_held_in(config.categories)
  missing = set(config.categories) - source.held_in.keys()
  # All categories are the default, of which there may be fewer.
  if missing and {*config.categories} != {*HELD_IN}:
    raise ValueError(
      f'categories has {", ".join(sorted(missing))}, of which there are no '
      f'tasks in {config.tasks!r}, only of {", ".join(source.held_in)}.'
    )
  held_in = {
    name: datasets
    for name, datasets in source.held_in.items()
    if name in config.categories
  }
  return dataclasses.replace(source, held_in=held_in)
