"""Training and scoring of the models of a study, before anything is merged.

Every model is the checkpoint that its training leaves. A phase that is started
again skips what is finished and goes on where it was killed.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
from pathlib import Path
import statistics
from typing import Any

import jax

from experiments.scale_study import loading, model, progress, shapes, stored
from experiments.scale_study.folder import Arm, Folder, read_json, write_json
from experiments.scale_study.scoring import Examination, Score
from experiments.scale_study.study_config import (
  INSTRUCTION_TUNED,
  PRETRAINED,
  Stored,
  StudyConfig,
)
from experiments.scale_study.tasks import batches
from experiments.scale_study.tasks.source import Dataset, Source
from experiments.scale_study.train import train
from mergekit_jax.sharding import make_mesh


class Size:
  """What all models of a size have in common."""

  def __init__(
    self, config: StudyConfig, folder: Folder, name: str, source: Source
  ):
    """Finds the shape; trains and loads nothing.

    Args:
      config: the preset.
      folder: of the results.
      name: of the size.
      source: of the tasks, as `loading.load_source` returns it.

    Raises:
      ValueError: if the tasks do not fit the models.
    """
    self.config, self.folder, self.name = config, folder, name
    self.source = source
    self.direct = loading.direct(config, source)
    self.mesh = make_mesh(config.mesh) if config.mesh else None
    self.models = config.sizes[name]
    if isinstance(self.models, Stored):
      if PRETRAINED in config.bases and self.models.pretrained is None:
        raise ValueError(
          f'There is no pretrained model of size {name!r}: take '
          f'--set=bases={INSTRUCTION_TUNED}, or give one in the preset.'
        )
      self.shape = stored.stored_shape(self.models)
      if self.source.tokenizer.size > self.shape.vocabulary_size:
        raise ValueError(
          f'The tokenizer has {self.source.tokenizer.size} ids, but the models '
          f'of size {name!r} only {self.shape.vocabulary_size}. Give their own '
          "in the preset: tokenizer='.../tokenizer.json'."
        )
    else:
      self.shape = shapes.small(
        vocabulary_size=-(-self.source.tokenizer.size // 16) * 16,
        width=self.models.width,
        layers=self.models.layers,
        heads=self.models.heads,
      )
    self.shape = shapes.computed(self.shape, config)

  @functools.cached_property
  def parameters(self) -> int:
    """Number of parameters."""
    specs = jax.tree.leaves(model.abstract_params(self.shape))
    return sum(spec.size for spec in specs)

  @functools.cached_property
  def examination(self) -> Examination:
    """The examples on which models are scored."""
    return Examination(
      self.shape,
      self.source,
      validation=self.config.validation_examples,
      test=self.config.test_examples,
      length=self.config.length,
      text_metric=self.config.text_metric,
    )

  def base(self, arm: Arm) -> Path:
    """Checkpoint of the base of an arm."""
    return self.folder.model(arm, 'base')

  def load(self, path: Path) -> model.Params:
    """Reads the parameters of a model of this size."""
    return stored.load(path, self.shape, self.mesh)

  def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """Computes on the mesh, if there is one."""
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

  def train(
    self,
    path: Path,
    params: model.Params,
    examples: Iterator[batches.Batch],
    steps: int,
    rate: float,
  ) -> model.Params:
    """Trains a model, or what is left to train of it."""
    state, _ = train(
      self.shape,
      params,
      examples,
      steps=steps,
      peak_rate=rate,
      label=str(path.relative_to(self.folder.root / 'models')),
      directory=path,
      mesh=self.mesh,
    )
    return state['params']

  def examples(
    self, datasets: Sequence[Dataset], seed: int
  ) -> Iterator[batches.Batch]:
    """Yields batches of training examples."""
    return batches.example_batches(
      datasets,
      self.source.tokenizer,
      batch=self.config.batch,
      length=self.config.length,
      seed=seed,
    )


def bases(size: Size, seed: int) -> None:
  """Makes the bases of a size: pretraining, then instruction tuning."""
  config = size.config
  arms = [
    Arm(size.name, base, seed) for base in (PRETRAINED, INSTRUCTION_TUNED)
  ]
  if isinstance(size.models, Stored):
    paths = (size.models.pretrained, size.models.instruction_tuned)
    for arm, path in zip(arms, paths, strict=True):
      wanted = arm.base in config.bases and not size.base(arm).exists()
      if wanted and path is not None:
        stored.copy(path, size.models, size.base(arm), size.mesh)
    return
  texts = batches.corpus_batches(
    size.source, batch=config.batch, length=config.corpus_length, seed=seed
  )
  params = size.train(
    size.base(arms[0]),
    model.create(size.shape, jax.random.key(seed)),
    texts,
    config.pretrain_steps,
    config.pretrain_rate,
  )
  if INSTRUCTION_TUNED in config.bases:
    size.train(
      size.base(arms[1]),
      params,
      size.examples(size.source.instruction, seed),
      config.instruction_steps,
      config.instruction_rate,
    )


def experts(size: Size, arm: Arm) -> None:
  """Trains an expert for each held-in category, at each rate."""
  _demand_trained(size, arm, 'base', size.base(arm))
  base = size.load(size.base(arm))
  for category, datasets in size.source.held_in.items():
    for rate in size.config.expert_rates:
      size.train(
        _expert(size, arm, category, rate),
        base,
        size.examples(datasets, arm.seed),
        size.config.expert_steps,
        rate,
      )


def multitask(size: Size, arm: Arm) -> None:
  """Trains one model on all held-in tasks, and for the gates the held-out."""
  _demand_trained(size, arm, 'base', size.base(arm))
  config, base = size.config, size.load(size.base(arm))
  held_in = [dataset for of in size.source.held_in.values() for dataset in of]
  size.train(
    size.folder.model(arm, 'multitask'),
    base,
    size.examples(held_in, arm.seed),
    config.multitask_steps,
    config.multitask_rate,
  )
  for category, datasets in size.direct.items():
    size.train(
      size.folder.model(arm, f'direct/{category}'),
      base,
      size.examples(datasets, arm.seed),
      config.direct_steps,
      config.direct_rate,
    )


def evaluate(size: Size, arm: Arm) -> None:
  """Scores all models of an arm and keeps the best rate of each expert."""
  # The paths of each model to choose from, and the categories it is scored on.
  models: dict[str, tuple[Sequence[Path], Sequence[str] | None]] = {
    'base': ([size.base(arm)], None),
    'multitask': ([size.folder.model(arm, 'multitask')], None),
  }
  for category in size.source.held_in:
    paths = [
      _expert(size, arm, category, rate) for rate in size.config.expert_rates
    ]
    models[f'experts/{category}'] = paths, [category]
  for category in size.direct:
    path = size.folder.model(arm, f'direct/{category}')
    models[f'direct/{category}'] = [path], [category]
  with progress.bar(len(models), f'{arm.name}/evaluate', 'model') as scored:
    for name, (paths, categories) in models.items():
      _score(size, arm, name, paths, categories)
      scored.update()


def mean_value(scores: dict[str, Score]) -> float:
  """Mean over tasks."""
  return statistics.fmean(score.value for score in scores.values())


def _score(
  size: Size,
  arm: Arm,
  name: str,
  paths: Sequence[Path],
  categories: Sequence[str] | None = None,
) -> None:
  """Scores the model that is best on validation data."""
  record = size.folder.score(arm, name)
  if record.exists():
    return
  kind, *_ = name.split('/')
  for path in paths:
    _demand_trained(size, arm, kind, path)
  exam, found = size.examination, []
  with size.on_mesh():
    for path in paths:
      params = size.load(path)
      found.append((exam.scores(params, 'validation', categories), path))
    validation, path = max(
      found, key=lambda pair: mean_value(pair[0]) if len(paths) > 1 else 0
    )
    params = size.load(path)
    test = exam.scores(params, 'test', categories)
    write_json(
      record,
      {
        'checkpoint': str(path.relative_to(size.folder.root)),
        'fingerprint': stored.fingerprint(params),
        'validation': validation,
        'test': test,
        'rouge_l': exam.written(params, categories),
      },
    )


class Scored:
  """What the models of an arm scored.

  Attributes:
    base: record of the base.
    multitask: record of the multitask model.
    experts: records of the experts by category.
    direct: records of the models of held-out categories, by category.
  """

  def __init__(self, size: Size, arm: Arm):
    """Reads the records, which `evaluate` wrote.

    Raises:
      ValueError: if it did not.
    """

    def read(name: str) -> Any:
      _demand(size.folder.score(arm, name), 'evaluate')
      return read_json(size.folder.score(arm, name))

    self.base, self.multitask = read('base'), read('multitask')
    held_in = size.source.held_in
    self.experts = {name: read(f'experts/{name}') for name in held_in}
    self.direct = {name: read(f'direct/{name}') for name in size.direct}

  def expert_values(self, split: str) -> dict[str, float]:
    """Score of each held-in task's own expert."""
    return {
      task: value
      for record in self.experts.values()
      for task, value in values(record, split).items()
    }


def values(record: Any, split: str) -> dict[str, float]:
  """Scores by task, without the losses."""
  return {task: value for task, (value, _) in record[split].items()}


def _demand_trained(size: Size, arm: Arm, kind: str, path: Path) -> None:
  """Raises ValueError if a model is not there, or not trained to its end."""
  config = size.config
  is_pretrained = arm.base == PRETRAINED
  phase, steps = {
    'base': (
      'bases',
      config.pretrain_steps if is_pretrained else config.instruction_steps,
    ),
    'experts': ('experts', config.expert_steps),
    'multitask': ('multitask', config.multitask_steps),
    'direct': ('multitask', config.direct_steps),
  }[kind]
  _demand(path, phase)
  is_copied = kind == 'base' and isinstance(size.models, Stored)
  if not is_copied:
    _demand(path / str(steps), phase)


def _demand(path: Path, phase: str) -> None:
  """Raises ValueError if an earlier phase has not left this behind."""
  if not path.exists():
    raise ValueError(
      f'There is no {path}: do --phase={phase} first, or all phases, by giving '
      'none.'
    )


def _expert(size: Size, arm: Arm, category: str, rate: float) -> Path:
  return size.folder.model(arm, f'experts/{category}/{rate:g}')
